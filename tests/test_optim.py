"""gptk.optim.AdamW: torch.optim.AdamW's numbers, state and scaler protocol, on every backend."""

import copy
import pickle

import pytest
import torch
from equivalence import require
from torch._subclasses import FakeTensorMode

from gptk.optim import AdamW

BACKENDS = ("torch", "cpp", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return require(request.param, "adamw")


def near(a, b, tol):
    return (torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max().item() <= tol


def gradient(step, like):
    values = torch.linspace(-1.0, 1.0, like.numel()).reshape(like.shape)
    return (values * (1.0 + 0.1 * step)).to(like.dtype)


@pytest.mark.parametrize("clip", [None, 0.25])
def test_twenty_steps_follow_torch(backend, clip):
    shapes = ((5, 7), (33,), (1,), (2, 3, 4))
    params = [torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in shapes]
    ours = [p.clone().requires_grad_() for p in params]
    theirs = [p.clone().double().requires_grad_() for p in params]
    options = dict(lr=1e-2, betas=(0.9, 0.95))
    a = AdamW(
        [{"params": ours[:2], "weight_decay": 0.1}, {"params": ours[2:], "weight_decay": 0.0}],
        max_grad_norm=clip,
        backend=backend,
        **options,
    )
    b = torch.optim.AdamW(
        [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}],
        **options,
    )
    for step in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad, q.grad = gradient(step, p), gradient(step, q)
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(theirs, clip)
        a.step()
        b.step()
        if clip is not None:
            assert near(a.grad_norm, norm, 1e-6 * float(norm))
    for p, q, start in zip(ours, theirs, params, strict=True):
        assert near(p, q, 20 * 2.0**-24)  # one rounding of a number of order 1 per step
        assert not near(p, start, 20 * 2.0**-24)


def test_decoupled_decay_one_step(backend, shown):
    case = shown.O1()
    i = case["inputs"]
    p = torch.nn.Parameter(i["p"].clone())
    p.grad = i["g"].clone()
    options = {name: i[name] for name in ("lr", "betas", "eps")}
    optimizer = AdamW([p], weight_decay=0.1, backend=backend, **options)
    state = {name: i[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[p].update(step=torch.tensor(5.0), **state)
    optimizer.step()
    right = case["expect"]["adamw"]
    assert near(p, right[0], case["tol"])
    assert near(state["exp_avg"], right[1], case["tol"])
    assert near(state["exp_avg_sq"], right[2], case["tol"])
    assert not near(p, case["expect"]["adam"][0], case["tol"])


@pytest.mark.parametrize("unscale", [True, False])
def test_the_scaler_unscales_once(backend, shown, unscale):
    case = shown.O3()
    i, right = case["inputs"], case["expect"]
    p = torch.nn.Parameter(i["p"].clone())
    optimizer = AdamW([p], lr=i["lr"], eps=i["eps"], weight_decay=0.0, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=i["scale"])
    scaler.scale((p * i["true_grad"]).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p], 10.0)
    scaler.step(optimizer)
    scaler.update()
    assert near(p, right["p"], case["tol"])
    assert near(optimizer.state[p]["exp_avg"], right["exp_avg"], case["tol"])
    assert not near(case["wrong"]["p"], right["p"], case["tol"])


def test_an_overflow_changes_nothing_and_halves_the_scale(backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.5, backend=backend)
    p.grad = torch.ones(3)
    optimizer.step()
    before = copy.deepcopy((p.detach(), optimizer.state_dict()["state"][0]))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer.zero_grad()
    scaler.scale((p * torch.tensor([1.0, float("inf"), 1.0])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert torch.equal(p.detach(), before[0])
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(value, before[1][name]), name


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_non_finite_gradient_is_skipped_and_reported(backend, bad):
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(5))
    optimizer = AdamW([p, q], lr=0.1, weight_decay=0.5, max_grad_norm=1.0, backend=backend)
    p.grad, q.grad = torch.tensor([1.0, bad, 1.0]), torch.ones(5)
    optimizer.step()
    assert bool(optimizer.skipped)
    assert torch.equal(p.detach(), torch.ones(3))
    assert torch.equal(q.detach(), torch.ones(5))
    assert float(optimizer.state[p]["step"]) == 0.0
    p.grad = torch.ones(3)
    optimizer.step()
    assert not bool(optimizer.skipped)
    assert float(optimizer.state[p]["step"]) == 1.0


def test_large_finite_gradients_are_clipped_right(backend, shown):
    case = shown.T5()
    p = torch.nn.Parameter(torch.ones(100))
    p.grad = case["inputs"]["grads"][0].clone()
    optimizer = AdamW([p], lr=1e-2, weight_decay=0.0, max_grad_norm=1.0, backend=backend)
    optimizer.step()
    assert near(optimizer.grad_norm / case["expect"]["first"]["norm"], 1.0, 1e-6)
    clipped = case["expect"]["first"]["clipped"]
    assert near(optimizer.state[p]["exp_avg"], torch.full((100,), 0.1 * clipped), case["tol"])


def test_the_first_step_of_a_process_and_a_moved_state(backend, shown):
    case = shown.O6()
    first = case["inputs"]["first_step"]
    p = torch.nn.Parameter(first["p"].clone())
    p.grad = first["g"].clone()
    AdamW([p], lr=first["lr"], weight_decay=0.0, backend=backend).step()
    assert near(p, case["expect"]["first_step"], case["tol"])

    def six(make_first, make_second):
        q = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.25]))
        optimizer = make_first([q])
        for step in range(1, 7):
            if step == 4:
                assert near(q, case["expect"]["after_3"], case["tol"])
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = make_second([q])
                optimizer.load_state_dict(saved)
            q.grad = torch.tensor([0.1, 0.2, -0.3]) * step
            optimizer.step()
        return q

    def ours(params):
        return AdamW(params, lr=1e-2, weight_decay=0.1, backend=backend)

    def torchs(params):
        return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)

    for pair in ((ours, ours), (ours, torchs), (torchs, ours)):
        assert near(six(*pair), case["expect"]["after_6"], case["tol"])


def test_a_gradient_of_another_layout_gives_its_values(backend):
    G = torch.arange(24.0).reshape(6, 4) / 24
    for param, grad in (
        (torch.ones(4, 6), G.t()),
        (torch.ones(6, 4).t(), G.t().contiguous()),
    ):
        p = torch.nn.Parameter(param)
        p.grad = grad
        q = torch.nn.Parameter(torch.ones(4, 6).double())
        q.grad = G.t().double().contiguous()
        AdamW([p], lr=1e-2, backend=backend).step()
        torch.optim.AdamW([q], lr=1e-2).step()
        assert near(p, q, 2.0**-23)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_of_16_bit_parameters_add_up(backend, dtype):
    p = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = AdamW([p], lr=6e-4, weight_decay=0.0, backend=backend)
    for _ in range(20):
        p.grad = torch.ones(4, dtype=dtype)
        optimizer.step()
    right = 1.0 - 20 * 6e-4
    assert near(p, torch.full((4,), right), right * 2.0**-8)
    assert not near(torch.ones(4), torch.full((4,), right), right * 2.0**-8)
    saved = copy.deepcopy(optimizer.state_dict())
    other = AdamW([torch.nn.Parameter(p.detach().clone())], lr=6e-4, weight_decay=0.0)
    other.load_state_dict(saved)
    (state,) = other.state.values()
    for name in ("exp_avg", "exp_avg_sq", "master"):
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], saved["state"][0][name])


def test_the_version_counter_moves_and_gradients_do_not_change(backend):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    version = p._version
    AdamW([p], lr=1e-2, max_grad_norm=0.1, backend=backend).step()
    assert p._version > version
    assert torch.equal(p.grad, torch.tensor([1.0, 2.0, 3.0]))


def test_empty_parameters_and_no_gradients_are_fine(backend):
    p, q = torch.nn.Parameter(torch.empty(0)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([p, q], lr=1e-2, backend=backend)
    optimizer.step()
    p.grad, q.grad = torch.empty(0), torch.ones(2)
    optimizer.step()
    assert p.shape == (0,)
    assert not torch.equal(q.detach(), torch.ones(2))


def test_a_learning_rate_may_be_a_tensor(backend):
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        AdamW([p], lr=lr, backend=backend).step()
        results.append(p.detach())
    assert near(results[0], results[1], 2.0**-24)


def trained(p, steps=3, **options):
    optimizer = AdamW([p], lr=1e-2, **options)
    for step in range(steps):
        p.grad = gradient(step, p)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_parameter_of_another_layout_gives_the_same_bits(backend, dtype):
    for start, strided in (
        (torch.randn(6, 4), lambda t: t.t().contiguous().t()),
        (torch.randn(2, 3, 4, 5), lambda t: t.contiguous(memory_format=torch.channels_last)),
    ):
        rows = torch.nn.Parameter(start.to(dtype))
        other = torch.nn.Parameter(strided(start.to(dtype)))
        a, b = trained(rows, backend=backend), trained(other, backend=backend)
        assert torch.equal(rows, other)
        loaded = AdamW([other], lr=1e-2, backend=backend)
        loaded.load_state_dict(b.state_dict())
        for optimizer, p in ((a, rows), (loaded, other)):
            p.grad = gradient(3, p)
            optimizer.step()
        assert torch.equal(rows, other)
        for name, value in a.state[rows].items():
            assert torch.equal(value, loaded.state[other][name]), name


def test_a_change_from_outside_stays(backend):
    """The float32 master of a 16-bit parameter must not undo what a user or a loader wrote."""
    layer = torch.nn.Linear(5, 3, bias=False).bfloat16()
    twin = copy.deepcopy(layer)
    a, b = (trained(x.weight, backend=backend) for x in (layer, twin))
    layer.weight.data[0].fill_(3.0)
    for optimizer, p in ((a, layer.weight), (b, twin.weight)):
        p.grad = torch.full_like(p, 0.01)
        optimizer.step()
    assert near(layer.weight[0], torch.full((5,), 3.0), 0.02)
    assert torch.equal(layer.weight[1:], twin.weight[1:])
    assert torch.equal(a.state[layer.weight]["master"][1:], b.state[twin.weight]["master"][1:])
    layer.load_state_dict({"weight": torch.full((3, 5), -2.0)})
    a.step()
    assert near(layer.weight, torch.full((3, 5), -2.0), 0.02)


def test_a_parameter_that_became_float32_has_no_master(backend):
    p = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer = trained(p, backend=backend)
    q = torch.nn.Parameter(p.detach().float())
    other = AdamW([q], backend=backend)
    other.load_state_dict(optimizer.state_dict())
    q.grad = torch.ones(5)
    other.step()
    assert "master" not in other.state[q]


def test_skipped_and_norm_are_those_of_the_last_step(backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], max_grad_norm=1.0, backend=backend)
    p.grad = torch.full((3,), float("inf"))
    optimizer.step()
    assert bool(optimizer.skipped)
    p.grad = None
    optimizer.step()
    assert not bool(optimizer.skipped)
    assert optimizer.grad_norm is None


def test_a_copy_steps_as_the_original_does(backend):
    start = torch.nn.Parameter(torch.ones(3))
    optimizer = trained(start, max_grad_norm=0.5, backend=backend)
    for same in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (p,) = same.param_groups[0]["params"]
        original = copy.deepcopy(start)
        other = AdamW([original], lr=1e-2, max_grad_norm=0.5, backend=backend)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for mine, x in ((same, p), (other, original)):
            x.grad = torch.ones(3)
            mine.step()
        assert torch.equal(p, original)
        assert torch.equal(same.grad_norm, other.grad_norm)
        assert (same.max_grad_norm, same.backend) == (0.5, backend)


def test_betas_may_be_a_list(backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = trained(p, betas=[0.9, 0.95], backend=backend)
    optimizer.param_groups[0]["betas"] = [0.9, 0.95]
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = [0.9, 0.95]  # what JSON makes of a tuple
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    optimizer.step()
    q = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [q], "betas": [0.8, 0.9]})
    q.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(q.detach(), torch.ones(3))


def test_two_devices_share_one_norm(monkeypatch):
    """Tensors without memory on two devices, where mixing them raises."""
    calls = []

    def fake(params, grads, *lists, grad_scale, found_inf, **options):
        def run(norm):
            calls.append((params[0].device, norm.device))
            return norm, norm.isnan() | (found_inf.to(norm.device) != 0)

        return run

    monkeypatch.setattr("gptk.optim.plan", fake)
    monkeypatch.setattr("gptk.optim.grad_norm", lambda grads, **_: grads[0].double().sum())
    with FakeTensorMode():
        devices = [torch.device("cuda:0"), torch.device("cuda:1")]
        params = [torch.nn.Parameter(torch.ones(3, device=d)) for d in devices]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = AdamW(params, max_grad_norm=1.0)
        optimizer.grad_scale = optimizer.found_inf = torch.ones((), device=devices[1])
        optimizer.step()
    assert calls == [(devices[0], devices[0]), (devices[1], devices[0])]
