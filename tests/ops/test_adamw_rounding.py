"""Stochastic rounding to bfloat16: the rule, its mean, and the same bits on every backend."""

import contextlib
import math

import pytest
import torch
from equivalence import require
from interpreter_checks import overflow_checks

from gptk import native
from gptk.ops.adamw import adamw_
from gptk.random import philox4x32, round_stochastically

SEED = 0x9E3779B97F4A7C15
LEVELS = native.isa_levels() if native.available() is None else ()
LARGEST = 0x7F7F


@pytest.fixture(params=("torch", "cpp", "triton"))
def backend(request):
    name = require(request.param, "adamw")
    checks = overflow_checks() if name == "triton" else contextlib.nullcontext()
    with checks:
        yield name


def from_bits(bits):
    """float32 of 32-bit patterns."""
    bits = torch.as_tensor(bits, dtype=torch.int64)
    return (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32)


def bits_of(t):
    """The pattern of each element; of NaN one for all, since arithmetic may change its sign."""
    if t.dtype == torch.bfloat16:
        return (t.view(torch.int16).long() & 0xFFFF).masked_fill(t.isnan(), 0x7FC0)
    return t.view(torch.int32).long() & 0xFFFFFFFF


def words(row, count, t, seed=SEED):
    """The random word of each element, one by one: counter (element // 4, row, row's high, t)."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    return [philox4x32(key, (i // 4, row & 0xFFFFFFFF, row >> 32, t))[i % 4] for i in range(count)]


def stored(values, backend, row=0, t=1, seed=SEED, offset=0):
    """`values` (float32) as the update rounds them: p = 0 - 1 * exp_avg, every factor exact.

    beta1 = 1/2 and lr / (1 - beta1^t) = 2 at t = 1 (lr follows t), eps = 1, no second moment.
    """
    p = torch.zeros(values.numel() + offset, dtype=torch.bfloat16)[offset:]
    lists = [[p], [torch.zeros_like(p)], [-values.clone()], [torch.zeros_like(values)]]
    step = torch.tensor(t - 1.0)
    adamw_(
        *lists, [step], lr=2.0 * (1.0 - 0.5**t), betas=(0.5, 0.5), eps=1.0, weight_decay=0.0,
        stochastic_rounding=True, seed=seed, rows=[row], backend=backend,
    )  # fmt: skip
    assert float(step) == t
    return p


def samples():
    """float32 of every kind, with bits below bfloat16's and without; subnormals are even, so that
    half of one is exact, and there is no -0, which 0 - 0 does not give."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(2100, generator=generator)  # two blocks of triton
    any_bits = torch.randint(0, 2**32, (500,), generator=generator) & ~1
    near_largest = torch.tensor([LARGEST << 16 | low for low in (0, 1, 0x7FFF, 0x8000, 0xFFFF)])
    edges = torch.tensor(
        [0, 2, 0x10000, 0x18000, 0x7F8000, 0x800000, 0x3F800000, 0x3F808000,
         0x3FFFFFFF, 0x7F7EFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345]
    )  # fmt: skip
    patterns = torch.cat([any_bits, near_largest, near_largest | 0x80000000, edges])
    return torch.cat([normal, from_bits(patterns)])


def expected(values, row, t, seed=SEED):
    """The rule once more, as a choice: up (away from 0) iff the random bits reach what is cut."""
    result = []
    for pattern, word in zip(bits_of(values).tolist(), words(row, len(values), t, seed),
                             strict=True):  # fmt: skip
        down, cut, random = pattern >> 16, pattern & 0xFFFF, word & 0xFFFF
        if pattern & 0x7FFFFFFF > 0x7F800000:
            result.append(0x7FC0)
        elif down & 0x7FFF == LARGEST:
            result.append(down + (cut >= 0x8000))  # as plain rounding does
        else:
            result.append(down + (random >= 0x10000 - cut))
    return result


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("row, t", [(0, 1), (3, 2), (2**33 + 5, 40)])
def test_every_value_is_rounded_by_the_rule(backend, row, t, offset):
    values = samples()
    got = stored(values, backend, row, t, offset=offset)
    assert bits_of(got).tolist() == expected(values, row, t)
    assert torch.equal(bits_of(got), bits_of(round_stochastically(values, SEED, row, t)))


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_rounds_to_the_same_bits(level):
    before = native.isa()
    values = samples()
    native.load().select_isa(level)
    try:
        got = stored(values, "cpp", 7, 3)
    finally:
        native.load().select_isa(before)
    assert torch.equal(bits_of(got), bits_of(round_stochastically(values, SEED, 7, 3)))


def test_the_bits_do_not_depend_on_the_number_of_threads():
    require("cpp", "adamw")
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(2))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(stored(values, "cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_bfloat16_holds_stays(backend):
    every = torch.arange(2**16)[::7]
    values = from_bits(every << 16)
    values = values[values.isfinite() & ((values == 0.0) | (values.abs() >= 2.0**-125))]
    for seed in (0, 1):
        assert torch.equal(bits_of(stored(values, backend, seed=seed).float()), bits_of(values))


def test_nan_and_infinity_stay_and_nothing_else_becomes_infinite(backend):
    largest = torch.finfo(torch.bfloat16).max
    above = from_bits([LARGEST << 16 | 0x7FFF] * 64)  # plain rounding: the largest
    beyond = from_bits([LARGEST << 16 | 0x8000] * 64)  # plain rounding: infinity
    special = torch.tensor([math.inf, -math.inf, math.nan])
    got = stored(torch.cat([above, -above, beyond, special]), backend).float()
    assert bool((got[:64] == largest).all())
    assert bool((got[64:128] == -largest).all())
    assert bool((got[128:192] == math.inf).all())
    assert got[192:194].tolist() == [math.inf, -math.inf]
    assert bool(got[194].isnan())


@pytest.mark.parametrize("cut", [1 / 64, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_mean_is_the_value(backend, sign, cut):
    """n draws of 0 or 1 ulp with probability f: their mean has deviation sqrt(f (1 - f) / n)."""
    n, ulp = 20_000, 2.0**-7
    x = sign * (1.0 + cut * ulp)
    got = stored(torch.full((n,), x), backend).double()
    assert set(got.unique().tolist()) == {sign, sign * (1.0 + ulp)}
    deviation = math.sqrt(cut * (1.0 - cut) / n)
    assert abs((got.mean().item() - x) / ulp) <= 5.0 * deviation
    nearest = torch.tensor(x).bfloat16().double().item()
    assert abs((nearest - x) / ulp) > 5.0 * deviation  # the check can see a bias


def test_draws_of_other_elements_rows_steps_and_seeds_are_independent():
    """Of two independent draws of probability 1/2, half agree: n of them to sqrt(n) / 2."""
    n = 20_000
    half = torch.full((n,), 1.0 + 2.0**-8)
    first = round_stochastically(half, SEED, 0, 1)
    others = [
        round_stochastically(half, *key)
        for key in ((SEED, 1, 1), (SEED, 2**32, 1), (SEED, 0, 2), (SEED + 1, 0, 1),
                    (SEED + 2**32, 0, 1))
    ]  # fmt: skip
    for other in [first.roll(1), first.roll(4), *others]:
        assert abs(int((first == other).sum()) - n / 2) <= 5.0 * math.sqrt(n) / 2


def test_updates_far_below_an_ulp_add_up(backend):
    """One step of lr from a bfloat16 value moves it by one ulp with probability lr / ulp, so k
    steps of n elements have a mean of deviation at most sqrt(k lr ulp / n)."""
    n, steps, lr, ulp = 512, 60, 1e-4, 2.0**-8
    lists = {}
    for stochastic in (False, True):
        p = torch.ones(n, dtype=torch.bfloat16)
        m, v, step = torch.zeros(n), torch.zeros(n), torch.zeros(())
        for _ in range(steps):
            adamw_(
                [p], [torch.ones_like(p)], [m], [v], [step], lr=lr, weight_decay=0.0,
                stochastic_rounding=stochastic, seed=SEED, backend=backend,
            )  # fmt: skip
        lists[stochastic] = p.double()
    assert bool((lists[False] == 1.0).all())  # lr is a fortieth of an ulp: rounded away each time
    deviation = math.sqrt(steps * lr * ulp / n)
    drift = lists[True].mean().item() - 1.0
    assert abs(drift + steps * lr) <= 5.0 * deviation
    assert steps * lr > 10.0 * deviation  # the check can see a stall


def test_a_skipped_call_rounds_nothing(backend):
    p = torch.full((9,), 1.5, dtype=torch.bfloat16)
    m, v, step = torch.ones(9), torch.ones(9), torch.zeros(())
    adamw_(
        [p], [torch.ones_like(p)], [m], [v], [step], lr=1e-3, found_inf=torch.ones(()),
        stochastic_rounding=True, seed=SEED, backend=backend,
    )  # fmt: skip
    assert bool((p == 1.5).all())
    assert float(step) == 0.0


def test_other_dtypes_of_the_call_are_as_without(backend):
    """float32 and float64 parameters hold what was computed: there is nothing to round."""
    results = []
    for stochastic in (False, True):
        params = [torch.randn(33, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        params = [params[0], params[1].double(), params[2].bfloat16()]
        kinds = [torch.float32, torch.float64, torch.float32]
        moments = [[torch.zeros(33, dtype=k) for k in kinds] for _ in range(2)]
        steps = [torch.zeros(()) for _ in params]
        adamw_(
            params, [torch.ones_like(p) for p in params], *moments, steps, lr=1e-3,
            stochastic_rounding=stochastic, seed=SEED, backend=backend,
        )  # fmt: skip
        results.append(params)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][2], results[1][2])


def test_masters_and_float16_are_refused(backend):
    def refused(match, p, masters=None):
        before = p.clone()
        lists = [[p], [torch.ones_like(p)], [torch.zeros(3)], [torch.zeros(3)], [torch.zeros(())]]
        with pytest.raises(ValueError, match=match):
            adamw_(*lists, lr=1e-3, masters=masters, stochastic_rounding=True, backend=backend)
        assert torch.equal(p, before)

    small = torch.ones(3, dtype=torch.bfloat16)
    refused("masters.*not both", small, [small.float()])
    refused("float16.*bfloat16 only", small.half())


def test_an_element_beyond_the_counter_is_refused():
    with torch.device("meta"):
        p = torch.ones(2**34 + 1, dtype=torch.bfloat16)
        lists = [[p], [p], [p.float()], [p.float()], [torch.zeros(())]]
        with pytest.raises(ValueError, match=str(2**34 + 1)):
            adamw_(*lists, lr=1e-3, stochastic_rounding=True, backend="torch")


def test_without_a_seed_torchs_generator_governs(backend):
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        p = torch.full((64,), 1.5, dtype=torch.bfloat16)
        lists = [[p], [torch.ones_like(p)], [torch.zeros(64)], [torch.zeros(64)]]
        adamw_(*lists, [torch.zeros(())], lr=1e-3, stochastic_rounding=True, backend=backend)
        results.append(p)
    assert torch.equal(*results)
    assert len(results[0].unique()) == 2
