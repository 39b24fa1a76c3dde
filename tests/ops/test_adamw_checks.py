"""adamw_: what it refuses, tensors of any layout, and masters that follow their parameters."""

import pytest
import torch
from equivalence import require
from torch._subclasses import FakeTensorMode

from gptk.ops import adamw as op
from gptk.ops.adamw import reference
from gptk.ops.adamw.cases import inputs

BACKENDS = ("torch", "cpp", "triton")
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters")
WRONG = {
    "grads": (torch.ones(3, 5), r"grads\[1\] .*\(3, 5\).*\(5, 7\)"),
    "exp_avgs": (torch.ones(2), r"exp_avgs\[1\] .*\(2,\).*\(5, 7\)"),
    "exp_avg_sqs": (torch.ones(7, 5), r"exp_avg_sqs\[1\] .*\(7, 5\).*\(5, 7\)"),
    "masters": (torch.ones(35), r"masters\[1\] .*\(35,\).*\(5, 7\)"),
    "step": (torch.ones(1), r"step\[1\] .*\(1,\).*\(\)"),
}
WRONG_DTYPE = {
    "exp_avg_sqs": (torch.ones(5, 7, dtype=torch.bfloat16), "bfloat16.*float32"),
    "masters": (torch.ones(5, 7, dtype=torch.bfloat16), r"masters\[1\] .*bfloat16.*float32"),
    "step": (torch.tensor(1), r"step\[1\] .*int64.*float32"),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return require(request.param, "adamw")


def refused(values, backend, match):
    names = ("params", "exp_avgs", "exp_avg_sqs", "step", "masters")
    before = [[t.clone() for t in values[name]] for name in names]
    with pytest.raises(ValueError, match=match):
        op.adamw_(**values, backend=backend)
    for name, copies in zip(names, before, strict=True):
        assert all(map(torch.equal, values[name], copies))


@pytest.mark.parametrize("name", WRONG)
def test_another_shape_is_refused(backend, name):
    values = inputs(((4,), (5, 7)), torch.bfloat16)
    values[name][1], match = WRONG[name]
    refused(values, backend, match)


@pytest.mark.parametrize("name", WRONG_DTYPE)
def test_another_dtype_is_refused(backend, name):
    values = inputs(((4,), (5, 7)), torch.bfloat16)
    values[name][1], match = WRONG_DTYPE[name]
    refused(values, backend, match)
    if name == "step":
        values[name][1] = torch.tensor(1.0, dtype=torch.float64)
        refused(values, backend, "float64.*float32")
    if name == "masters":
        values = inputs(((4,), (5, 7)), torch.float64)
        values[name] = [None, torch.ones(5, 7)]
        with pytest.raises(ValueError, match=r"masters\[1\] .*float64.*16 bits"):
            op.adamw_(**values, backend=backend)


def test_another_device_is_refused(backend):
    values = inputs(((4,), (5, 7)), torch.float32)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "step"):
        wrong = {**values, name: [values[name][0], values[name][1].to("meta")]}
        with pytest.raises(ValueError, match=rf"{name}\[1\] .*meta.*cpu"):
            op.adamw_(**wrong, backend=backend)


def test_lists_of_another_length_are_refused(backend):
    for name in ("grads", "exp_avgs", "exp_avg_sqs", "step", "masters", "lr", "weight_decay"):
        values = inputs(((4,), (5, 7)), torch.bfloat16)
        values[name] = [0.1] * 3 if name in ("lr", "weight_decay") else values[name] * 2
        with pytest.raises(ValueError, match=rf"{len(values[name])} {name}.* 2 params"):
            op.adamw_(**values, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("which", [*LISTS, LISTS], ids=[*LISTS, "all"])
def test_every_tensor_may_have_its_own_layout(backend, which, dtype):
    shapes = ((5, 7), (2, 3, 4, 2))
    want, values = inputs(shapes, dtype), inputs(shapes, dtype)
    for name in LISTS:
        if name in which and values[name]:
            first, last = values[name]
            channels = last.contiguous(memory_format=torch.channels_last)
            values[name] = [first.t().contiguous().t(), channels]
    for _ in range(2):
        op.adamw_(**want, backend=backend)
        op.adamw_(**values, backend=backend)
    for name in LISTS:
        assert all(map(torch.equal, values[name] or (), want[name] or ())), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_changed_parameter_wins_over_its_master(backend, dtype):
    """Where the master's rounding is the parameter, its further bits stay; elsewhere they go."""
    n = 2050  # two blocks of triton
    values = inputs(((n,), (3,)), dtype)
    (p, _), (master, other) = values["params"], values["masters"]
    master.mul_(1.0 + 2.0**-13)
    p.copy_(master)
    p[::3] = 3.0
    if dtype == torch.bfloat16:  # numpy, which interprets, warns of an overflow to float16
        p[1], master[1] = float("inf"), 3.4e38  # rounds to it: the master is kept
    p[4], master[4] = float("nan"), 1.0
    want = inputs(((n,), (3,)), dtype)
    want["masters"] = [torch.where(master.to(dtype) == p, master, p.float()), other.clone()]
    want["params"] = [torch.zeros(n), torch.zeros(3)]
    kept = (want["masters"][0] != p.float()).sum()
    assert n // 2 < kept < n  # the case has further bits to keep
    op.adamw_(**values, backend=backend)
    plain = {**want, "params": [m.clone() for m in want["masters"]], "masters": None}
    op.adamw_(**plain, backend=backend)
    right = plain["params"][0]
    assert torch.equal(master[:4], right[:4])
    assert torch.equal(master[5:], right[5:])
    assert p[4].isnan()
    assert torch.equal(p[5:], right[5:].to(dtype))
    assert torch.equal(other, plain["params"][1])


def test_a_skipped_call_leaves_the_master_too(backend):
    values = inputs(((5,),), torch.bfloat16)
    values["params"][0].fill_(3.0)
    before = values["masters"][0].clone()
    op.adamw_(**values, found_inf=torch.ones(1), backend=backend)
    assert torch.equal(values["masters"][0], before)


def test_scalars_come_to_the_device_of_the_parameters(monkeypatch):
    """Tensors without memory on two devices, where mixing them raises."""
    seen = []

    class Fake:
        factors = staticmethod(reference.factors)

        @staticmethod
        def update(params, grads, m, v, masters, steps, lr, decay, b1, b2, eps, by, skip, rounding):
            seen.extend(x.device for x in (by, skip, *lr, *decay))

    Fake.__name__ = "fake.reference"
    monkeypatch.setattr(op, "resolve", lambda *_: Fake)
    with FakeTensorMode():
        here, there = torch.device("cuda:0"), torch.device("cuda:1")
        one = torch.ones((), device=here)
        lists = [[torch.ones(3, device=there)] for _ in range(4)]
        norm, skip = op.adamw_(
            *lists, [torch.ones((), device=there)], lr=one, weight_decay=[one], norm=one,
            grad_scale=one, found_inf=one,
        )  # fmt: skip
    assert norm.device == skip.device == there
    assert seen == [there] * 4
