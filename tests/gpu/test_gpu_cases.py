"""Every op's own cases on the GPU, odd sizes and every flag: each kernel as compiled code."""

import pytest
import torch
from equivalence import CASES
from on_device import DEVICE, DRY, DTYPES, MARKS

from benchmarks.gpu import equivalence, rivals, shapes
from gptk.bench import gate

pytestmark = MARKS
OPS = [op for op in CASES if op != "adamw"]


def inputs(op, case, dtype):
    values = CASES[op].inputs(dtype=dtype, **CASES[op].CASES[case])
    return shapes.place(values, DEVICE)


def some(op):
    """All cases on a GPU; the interpreter, which has its own tests of them, takes the first."""
    return list(CASES[op].CASES)[: 1 if DRY else None]


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("op, case", [(op, case) for op in OPS for case in some(op)])
def test_a_case_matches_the_reference(op, case, dtype):
    kind = getattr(torch, dtype)
    values = inputs(op, case, kind)
    if kind == torch.float64:  # the oracle's own precision: float32's error, scaled, made twice
        known = equivalence.answers(op, values)
        single = equivalence.answers(op, shapes.convert(values, torch.float32))
        rough = [gate.error(a, b) for a, b in zip(single.torchs, single.exact, strict=True)]
        near = [t + 2 * 2.0**-29 * e for t, e in zip(known.truth, rough, strict=True)]
        known = known._replace(torchs=near, exact=known.truth)
        found = equivalence.judge(known, gate.answer(op, rivals.ours(op), values))
    else:
        found = equivalence.compare(op, values)
    assert [one for one in found if not one.passed] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, case", [("adamw", case) for case in some("adamw")])
def test_an_update_matches_the_reference(op, case, dtype):
    options = CASES[op].CASES[case]
    if options.get("stochastic_rounding") and dtype != "float32":
        pytest.skip("16-bit parameters are rounded at random here: tests/ops/test_adamw_triton.py")
    found = equivalence.compare_adamw(inputs(op, case, getattr(torch, dtype)))
    assert [one for one in found if not one.passed] == []


def strided(t):
    """The same values, every second element of a larger buffer and the first axis innermost."""
    if not t.is_floating_point() or t.dim() == 0:
        return t
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 2, dtype=t.dtype, device=t.device)
    view = wide[..., 1 : 1 + 2 * t.shape[-1] : 2]
    view.copy_(t)
    return view.movedim(0, -1).contiguous().movedim(-1, 0) if view.dim() >= 2 else view


@pytest.mark.parametrize("op", OPS)
def test_any_layout_gives_the_same_bits_and_inputs_stay(op):
    case = {"attention": "odd_causal"}.get(op, "odd")
    values = inputs(op, case, torch.float32)
    other = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    before = {k: v.clone() for k, v in values.items() if isinstance(v, torch.Tensor)}
    plain, odd = (gate.answer(op, rivals.ours(op), each) for each in (values, other))
    assert all(torch.equal(a, b) for a, b in zip(plain, odd, strict=True))
    assert all(torch.equal(values[k], t) for k, t in before.items())


@pytest.mark.parametrize("op", OPS)
def test_one_nan_reaches_what_the_reference_says(op):
    case = {"attention": "odd_causal", "cross_entropy": "none", "linear_cross_entropy": "none"}
    values = inputs(op, case.get(op, "odd"), torch.float32)
    name = CASES[op].DIFFERENTIABLE[0]
    values[name].view(-1)[values[name].numel() // 2] = torch.nan
    exact = equivalence.reference(op)(**shapes.convert(values, torch.float64))
    found = rivals.ours(op)(**values)
    assert torch.equal(found.isnan(), exact.isnan())
