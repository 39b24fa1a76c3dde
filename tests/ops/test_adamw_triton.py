"""adamw by Triton."""

import itertools
import math

import pytest
import torch
from triton_checks import DEVICE, bits, check, guarded, randn, strict, unchanged

from gptk.ops.adamw import reference
from gptk.ops.adamw import triton_impl as adamw
from gptk.ops.triton_launch import ACC

__all__ = ["strict"]

SIZES = (3, 0, 2048, 2049, 1, 0)  # around one block, odd, empty in the middle and at the end


class State:
    """Parallel lists as `update` takes them, and the same in float64 for the formula."""

    def __init__(self, dtype, sizes=SIZES, masters=False, offset=0):
        acc = ACC[dtype]
        self.params = [randn(n + offset, dtype=dtype)[offset:] for n in sizes]
        self.masters = [p.to(acc) if masters else None for p in self.params]
        self.exp_avgs = [guarded(torch.zeros(n, dtype=acc)) for n in sizes]
        self.exp_avg_sqs = [guarded(torch.zeros(n, dtype=acc)) for n in sizes]
        self.steps = [torch.zeros((), device=DEVICE) for _ in sizes]
        self.exact = [[p.double().clone(), 0.0 * p.double(), 0.0 * p.double()] for p in self.params]

    def tensors(self):
        masters = [m for m in self.masters if m is not None]
        return [*self.params, *masters, *self.exp_avgs, *self.exp_avg_sqs, *self.steps]

    def update(self, grads, lr=1e-2, wd=0.1, b1=0.9, b2=0.999, eps=1e-8, by=1.0, skip=None):
        count = len(grads)
        lr, wd = (x if isinstance(x, list) else [x] * count for x in (lr, wd))
        adamw.update(
            self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.masters, self.steps,
            lr, wd, b1, b2, eps, by, skip,
        )  # fmt: skip

    def update_exact(self, grads, t, lr=1e-2, wd=0.1, b1=0.9, b2=0.999, eps=1e-8, by=1.0):
        for state, g in zip(self.exact, grads, strict=True):
            p, m, v = state
            g = g.double() * by
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            p = p * (1 - lr * wd)
            p = p - lr / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + eps)
            state[:] = p, m, v


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(
    "dtype, masters",
    [
        (torch.float32, False),
        (torch.float64, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
        (torch.float16, True),
    ],
    ids=["float32", "float64", "bfloat16", "bfloat16-masters", "float16-masters"],
)
def test_five_steps_match_formula(dtype, masters, offset):
    state = State(dtype, masters=masters, offset=offset)
    # torch's step in the precision of the kept parameter is the yardstick
    work = torch.bfloat16 if dtype == torch.bfloat16 and not masters else torch.float32
    wide = work != torch.bfloat16
    theirs = [p.to(work).clone().requires_grad_() for p in state.params]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for t in range(1, 6):
        grads = [randn(p.numel() + offset, dtype=dtype)[offset:] for p in state.params]
        before = bits(*grads)
        state.update(grads, by=0.5)
        assert unchanged(before, *grads)
        state.update_exact(grads, t, by=0.5)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = (g * 0.5).to(work)
        optimizer.step()
    assert [s.item() for s in state.steps] == [5.0] * len(SIZES)
    kept = state.masters if masters else state.params
    pick = [i for i, n in enumerate(SIZES) if n]
    check(
        torch.cat([kept[i] for i in pick]),
        torch.cat([state.exact[i][0] for i in pick]),
        torch.cat([theirs[i].detach() for i in pick]),
        2,
    )
    for i in pick if wide else []:
        for mine, exact, name in (
            (state.exp_avgs[i], state.exact[i][1], "exp_avg"),
            (state.exp_avg_sqs[i], state.exact[i][2], "exp_avg_sq"),
        ):
            check(mine.contiguous(), exact, optimizer.state[theirs[i]][name], 3)
    if masters:
        assert all(torch.equal(p, m.to(dtype)) for p, m in zip(state.params, kept, strict=True))


def test_decay_is_apart_from_the_moments():
    """FlagGems#4988: AdamW's mathematics, not Adam's with L2; the step count goes on from 5."""
    state = State(torch.float32, sizes=(3,))
    p, m, v = [1.0, -2.0, 0.5], [0.01, -0.02, 0.03], [1e-4, 2e-4, 3e-4]
    g = [0.1, 0.2, -0.3]
    for tensor, values in zip((state.params, state.exp_avgs, state.exp_avg_sqs), (p, m, v),
                              strict=True):  # fmt: skip
        tensor[0].copy_(torch.tensor(values))
    state.steps[0].fill_(5.0)
    state.exact = [[torch.tensor(x, dtype=torch.float64) for x in (p, m, v)]]
    state.update([guarded(torch.tensor(g))])
    state.update_exact([torch.tensor(g, dtype=torch.float64)], 6)
    got, exact = state.params[0].double().cpu(), state.exact[0][0]
    assert (got - exact).abs().max() <= 2 * 2.0**-24 * 2
    decayed = torch.tensor(p, dtype=torch.float64) * (1 - 1e-2 * 0.1)
    assert (decayed - torch.tensor(p)).abs().min() > 100 * 2.0**-24  # the check can see the decay


def test_first_step_has_no_float32_bias_correction():
    """1 - 0.999 in float32 is off by 1e-5 and 0.999^1 by 6e-5 of the difference."""
    state = State(torch.float32, sizes=(1,))
    state.params[0].fill_(0.0)
    state.update([guarded(torch.full((1,), 1e-3))], lr=1.0, wd=0.0)
    assert abs(state.params[0].item() + 1e-3 / (1e-3 + 1e-8)) <= 4 * 2.0**-24


@pytest.mark.parametrize(
    "skip",
    [
        torch.tensor(True),
        torch.tensor(1.0),
        torch.tensor(math.nan),
        torch.tensor(2, dtype=torch.bfloat16),
    ],
    ids=["bool", "float", "nan", "bfloat16"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skip_changes_nothing(skip, value):
    state = State(torch.bfloat16, masters=True)
    grads = [guarded(torch.full_like(p, value, device="cpu")) for p in state.params]
    before = bits(*state.tensors())
    state.update(grads, skip=skip.to(DEVICE))
    assert unchanged(before, *state.tensors())


@pytest.mark.parametrize(
    "go", [torch.tensor(False), torch.tensor(0.0), torch.tensor(-0.0, dtype=torch.bfloat16)]
)
def test_zero_skip_is_the_same_as_none(go):
    states = [State(torch.float32, sizes=(5, 2)) for _ in range(2)]
    for state in states:
        for p in state.params:
            p.fill_(0.5)
    grads = [randn(5), randn(2)]
    states[0].update(grads, skip=go.to(DEVICE))
    states[1].update(grads)
    for a, b in zip(states[0].tensors(), states[1].tensors(), strict=True):
        assert torch.equal(a, b)
    assert states[0].steps[0].item() == 1.0


def test_lr_and_decay_of_each_parameter_as_numbers_or_tensors():
    rates, decays = [1e-2, 3e-3], [0.1, 0.0]
    kinds = [
        (rates, decays, 0.25),
        *(
            ([torch.tensor(x, dtype=d, device=DEVICE) for x in rates],
             [torch.tensor(x, dtype=d, device=DEVICE) for x in decays],
             torch.tensor(0.25, dtype=d, device=DEVICE))
            for d in (torch.float64, torch.float32)
        ),
    ]  # fmt: skip
    grads = [randn(4), randn(6)]
    results = []
    for lr, wd, by in kinds:
        state = State(torch.float32, sizes=(4, 6))
        for p in state.params:
            p.fill_(1.0)
        state.update(grads, lr=lr, wd=wd, by=by)
        results.append(state.params)
    for i, (lr, wd) in enumerate(zip(rates, decays, strict=True)):
        g = 0.25 * grads[i].double()
        want = 1 - lr * wd - lr * g / (g.abs() + 1e-8)
        for params in results:
            assert (params[i].double() - want).abs().max() <= 4 * 2.0**-24


def test_own_step_count_of_each_parameter():
    state = State(torch.float32, sizes=(2, 2))
    for p in state.params:
        p.zero_()
    state.steps[1].fill_(9.0)
    state.update([torch.ones(2, device=DEVICE)] * 2, lr=1.0, wd=0.0)
    assert [s.item() for s in state.steps] == [1.0, 10.0]
    want = [-1.0, -(0.1 / (1 - 0.9**10)) / math.sqrt(1e-3 / (1 - 0.999**10))]
    for p, x in zip(state.params, want, strict=True):
        assert (p.double() - x).abs().max() <= 8 * 2.0**-24 * abs(x)


def test_mixed_dtypes_in_one_call():
    state = State(torch.float32, sizes=(3, 4))
    other = State(torch.bfloat16, sizes=(5,), masters=True)
    for name in ("params", "masters", "exp_avgs", "exp_avg_sqs", "steps", "exact"):
        getattr(state, name).extend(getattr(other, name))
    grads = [randn(3, dtype=torch.bfloat16), randn(4), randn(5, dtype=torch.bfloat16)]
    state.update(grads)
    state.update_exact(grads, 1)
    for p, exact in zip([*state.params[:2], state.masters[2]], state.exact, strict=True):
        assert (p.double() - exact[0]).abs().max() <= 8 * 2.0**-24 * exact[0].abs().max()


def test_beta_zero_and_no_parameters():
    state = State(torch.float32, sizes=(4,))
    state.params[0].zero_()
    state.update([randn(4).abs() + 0.1], b1=0.0, b2=0.0, lr=0.5, wd=0.0)
    assert (state.params[0] + 0.5).abs().max() <= 1e-7 / 0.1
    State(torch.float32, sizes=()).update([])
    State(torch.float32, sizes=(0,)).update([torch.empty(0, device=DEVICE)])


def test_norm_is_exact_and_does_not_overflow():
    grads = [randn(3), randn(5000), randn(1, dtype=torch.bfloat16), randn(7, dtype=torch.float64)]
    grads += [randn(9)[1:], torch.empty(0, device=DEVICE), randn(4096, dtype=torch.float16)]
    before = bits(*grads)
    want = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
    got = adamw.norm(grads)
    assert got.dtype == torch.float64
    assert got.shape == ()
    assert abs(got.item() - want) <= 1e-14 * want
    assert unchanged(before, *grads)
    large = adamw.norm([torch.full((1,), 1e20, device=DEVICE) for _ in range(100)]).item()
    assert abs(large - 1e21) <= 1e21 * 2.0**-24  # float32 holds 1e20 to that
    assert adamw.norm([guarded(torch.tensor([1.0, math.inf]))]).item() == math.inf
    assert adamw.norm([guarded(torch.tensor([1.0, math.nan])), randn(2)]).isnan()
    assert adamw.norm([torch.empty(0, device=DEVICE)]).item() == 0.0


@pytest.mark.parametrize("norm", [None, 0.0, 0.25, 3.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("limit", [None, 0.5, math.inf])
def test_factors_are_those_of_the_reference(norm, limit):
    """Each is at most four roundings of float64 from the exact one, by either way."""
    dtypes = (torch.float32, torch.float64)
    for dtype, scaled, scale, found in itertools.product(
        dtypes, (True, False), (None, 4.0, 3.0, 65536.0), (None, 0.0, 1.0, math.nan)
    ):
        norm_, scale_, found_ = (
            None if x is None else torch.tensor(x, dtype=d, device=DEVICE)
            for x, d in ((norm, dtype), (scale, torch.float64), (found, torch.float32))
        )
        got = adamw.factors(norm_, scaled, scale_, found_, limit)
        want = reference.factors(norm_, scaled, scale_, found_, limit)
        for name, a, b in zip(("norm", "skip", "multiplier"), got, want, strict=True):
            case = (name, dtype, scaled, scale, found, a, b)
            assert (a is None) == (b is None), case
            if name == "skip" and a is not None:
                assert a.dtype == torch.bool, case
                assert bool(a) == bool(b), case
            elif a is not None and not (want[1] is not None and bool(want[1])):
                a, b = float(a), float(b)
                same = a == b or (math.isnan(a) and math.isnan(b))
                # torch computes in float32 what it is given in float32
                assert same or abs(a - b) <= abs(b) * 8 * torch.finfo(dtype).eps, case


def test_same_inputs_give_the_same_norm():
    grads = [randn(7000), randn(3)]
    assert torch.equal(adamw.norm(grads), adamw.norm([g.clone() for g in grads]))


def test_update_rejects_no_answer_silently():
    """The yardstick of these tests sees a wrong sign, a missing decay and a lost step."""
    state = State(torch.float32, sizes=(8,))
    start, grads = state.params[0].double(), [randn(8)]
    state.update(grads)
    state.update_exact(grads, 1)
    exact = state.exact[0][0]
    limit = 8 * 2.0**-24 * exact.abs().max()
    assert (state.params[0].double() - exact).abs().max() <= limit
    wrong = [start, 2 * start - exact, exact + 1e-2 * 0.1 * start]
    assert all((x - exact).abs().max() > limit for x in wrong)
