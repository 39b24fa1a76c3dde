"""gptk.optim.AdamW refuses, in one sentence, what it would otherwise get wrong in silence."""

import copy

import pytest
import torch
from equivalence import require

from gptk.optim import AdamW


@pytest.fixture(params=("torch", "cpp", "triton"))
def backend(request):
    return require(request.param, "adamw")


def trained(p, steps=3, backend="torch"):
    optimizer = AdamW([p], lr=1e-2, backend=backend)
    for step in range(steps):
        p.grad = torch.full_like(p, 0.5 + step)
        optimizer.step()
    return optimizer


def test_wrong_settings_are_refused():
    p = [torch.nn.Parameter(torch.ones(1))]
    q = torch.nn.Parameter(torch.ones(1))
    for wrong in (
        dict(lr=-1.0), dict(betas=(0.9, 1.0)), dict(betas=(0.9,)), dict(eps=-1e-8),
        dict(weight_decay=-0.1),
    ):  # fmt: skip
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=name):
            AdamW(p, **wrong)
        with pytest.raises(ValueError, match=name):
            AdamW(p).add_param_group({"params": q, **wrong})
    with pytest.raises(ValueError, match="max_grad_norm"):
        AdamW(p, max_grad_norm=0.0)


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_options_that_would_be_ignored_are_refused(option):
    p, q = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    group = {"params": [q], option: True}
    with pytest.raises(ValueError, match=option):
        AdamW([group])
    optimizer = AdamW([p])
    with pytest.raises(ValueError, match=option):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    stored = torch.optim.AdamW([p], **{option: True}).state_dict()
    with pytest.raises(ValueError, match=option):
        optimizer.load_state_dict(stored)
    assert not optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = True
    with pytest.raises(ValueError, match=option):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(1))


def test_other_groups_that_would_be_ignored_are_refused():
    q = torch.nn.Parameter(torch.ones(1))
    for name, value in (("decoupled_weight_decay", False), ("max_grad_norm", 1.0), ("backend", "")):
        with pytest.raises(ValueError, match=name):
            AdamW([{"params": [q], name: value}])
    for named in ([q, q], iter([q, q]), [("a", q), ("b", q)]):
        with pytest.raises(ValueError, match="more than once"):
            AdamW(named)
    fast = torch.optim.AdamW([q], foreach=True).state_dict()  # another loop, the same numbers
    AdamW([q]).load_state_dict(fast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_of_another_shape_is_refused(dtype):
    p, q = (torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in ((2, 3), (3, 2)))
    stored = trained(p, steps=1, backend="torch").state_dict()
    optimizer = trained(q, steps=1, backend="torch")
    before = copy.deepcopy(optimizer.state_dict())
    bad = [stored]
    for name in stored["state"][0]:
        good = copy.deepcopy(before)
        good["state"][0][name] = torch.ones(2)
        bad.append(good)
    lacking = copy.deepcopy(before)
    del lacking["state"][0]["exp_avg"]
    for state, match in (
        *((state, r"(\(2, 3\)|\(2,\)).*\((3, 2)?\)") for state in bad),
        (lacking, "no exp_avg"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)
        for name, value in optimizer.state[q].items():
            assert torch.equal(value, before["state"][0][name]), name


def test_a_gradient_of_another_shape_is_refused(backend):
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = trained(p, backend=backend)
    p.data = torch.ones(7, 9)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(7, 9\)"):
        optimizer.step()


def test_a_loaded_step_count_lies_beside_its_parameter():
    p = torch.nn.Parameter(torch.ones(3))
    saved = trained(p, backend="torch").state_dict()
    q = torch.nn.Parameter(torch.ones(3, device="meta"))
    for step in (saved["state"][0]["step"], torch.tensor([3]), 3):
        saved["state"][0]["step"] = step
        optimizer = AdamW([q])
        optimizer.load_state_dict(saved)
        loaded = optimizer.state[q]["step"]
        assert (loaded.device.type, loaded.dtype, loaded.shape) == ("meta", torch.float32, ())


def shape_of_a_moment(p, optimizer, monkeypatch):
    optimizer.state[p]["exp_avg"] = torch.zeros(9)
    return r"exp_avgs\[0\].*\(9,\)"


def dtype_of_a_moment(p, optimizer, monkeypatch):
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].long()
    return r"exp_avgs\[0\].*int64"


def dtype_of_a_step(p, optimizer, monkeypatch):
    optimizer.state[p]["step"] = torch.zeros((), dtype=torch.float64)
    return r"step\[0\].*float64"


def shape_of_the_parameter(p, optimizer, monkeypatch):
    p.data = torch.ones(9, dtype=p.dtype)
    return r"grads\[0\].*\(9,\)"


def backend_of_the_dtype(p, optimizer, monkeypatch):
    """As a backend that has no kernel for the dtype would."""
    from gptk.ops import adamw
    from gptk.ops.contract import Unsupported

    resolve = adamw.resolve

    def picky(op, name, tensor, dtype=None, **traits):
        if (dtype or tensor.dtype) == p.dtype:
            raise Unsupported(f"no kernel for {p.dtype}")
        return resolve(op, name, tensor, dtype, **traits)

    monkeypatch.setattr(adamw, "resolve", picky)
    return "no kernel for torch.bfloat16"


def sparse_gradient(p, optimizer, monkeypatch):
    p.grad = p.grad.to_sparse()
    return "dense"


def option_of_the_group(p, optimizer, monkeypatch):
    optimizer.param_groups[-1]["maximize"] = True
    return "maximize"


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("first", [True, False], ids=["later", "before"])
@pytest.mark.parametrize(
    "spoil",
    [
        shape_of_a_moment,
        dtype_of_a_moment,
        dtype_of_a_step,
        shape_of_the_parameter,
        backend_of_the_dtype,
        sparse_gradient,
        option_of_the_group,
    ],
    ids=lambda f: f.__name__,
)
def test_a_refused_step_changes_nothing(backend, spoil, first, max_grad_norm, monkeypatch):
    """float32, float64 and, last, bfloat16 parameters are updated by a call each; the last call is
    refused, and the others have done nothing: neither updated nor counted nor made a state."""
    kinds = (torch.float32, torch.float64, torch.bfloat16)
    params = [torch.nn.Parameter(torch.ones(2, 3, dtype=kind)) for kind in kinds]
    late = torch.nn.Parameter(torch.ones(5))  # has a gradient for the first time
    optimizer = AdamW(
        [{"params": [*params[:2], late]}, {"params": params[2:]}],
        max_grad_norm=max_grad_norm,
        backend=backend,
    )
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    if not first:
        optimizer.param_groups.reverse()
    optimizer.step()
    late.grad = torch.ones(5)
    match = spoil(params[2], optimizer, monkeypatch)
    everything = [*params, late]
    before = copy.deepcopy([p.data for p in everything])
    states = copy.deepcopy([optimizer.state.get(p) for p in everything])
    versions = [p._version for p in everything]
    with pytest.raises((ValueError, RuntimeError), match=match):
        optimizer.step()
    assert states[-1] is None
    for p, value, state, version in zip(everything, before, states, versions, strict=True):
        assert torch.equal(p.data, value)
        assert p._version == version
        assert (optimizer.state.get(p) is None) == (state is None)
        for name, tensor in (state or {}).items():
            assert torch.equal(optimizer.state[p][name], tensor), name


def test_stochastic_rounding_of_float16_is_refused_in_any_form_of_a_group():
    half = torch.zeros(3, dtype=torch.float16, requires_grad=True)
    for params in ([half], [{"params": half}], [{"params": [half]}], [("name", half)]):
        with pytest.raises(ValueError, match="put float16 parameters into"):
            AdamW(params, lr=1e-3, stochastic_rounding=True)
