"""The cases of `make gpu`, shrunk on the CPU: every one has a truth, a yardstick and a rank."""

import importlib

import pytest
import torch

from benchmarks.gpu import equivalence, shapes
from benchmarks.gpu.timing_cases import CASES
from gptk.bench import gate

LIMITS = dict(B=2, H=4, Hkv=1, Tq=9, Tk=9, D=8, N=11, V=37, hidden=20)
OPS = [op for op in shapes.REAL if op != "adamw"]
SIZES = {op: {**shapes.REAL[op], **{case.name: case.sizes for case in CASES[op]}} for op in OPS}
OWN = {op: importlib.import_module(f"gptk.ops.{op}.cases").CASES for op in OPS}


def shrunk(sizes):
    """The same flags and the same number of dimensions, each small."""
    small = {k: min(v, LIMITS[k]) if k in LIMITS else v for k, v in sizes.items()}
    if "shape" in sizes:
        small["shape"] = tuple(min(n, 3 + i) for i, n in enumerate(sizes["shape"]))
    return small


def assert_known(op, sizes, dtype):
    """The op's definition, in this dtype, passes for right, and its shapes are PyTorch's."""
    module = importlib.import_module(f"gptk.ops.{op}.cases")
    values = module.inputs(**sizes, dtype=dtype)
    known = equivalence.answers(op, values)
    assert [t.shape for t in known.torchs] == [t.shape for t in known.exact]
    found = equivalence.judge(known, gate.answer(op, equivalence.reference(op), values))
    assert [one for one in found if not one.passed] == []


@pytest.mark.parametrize("op, case", [(op, case) for op in OPS for case in SIZES[op]])
def test_a_real_case_can_be_judged_at_its_rank(op, case):
    assert_known(op, shrunk(SIZES[op][case]), torch.float32)


@pytest.mark.parametrize("op, case", [(op, case) for op in OPS for case in OWN[op]])
def test_a_case_of_the_op_can_be_judged(op, case):
    assert_known(op, OWN[op][case], torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_a_dry_run_keeps_the_rank_of_real_sizes(op):
    tiny = shapes.TINY[op]
    assert {len(sizes.get("shape", ())) for sizes in shapes.REAL[op].values()} == {
        len(tiny.get("shape", ()))
    }
