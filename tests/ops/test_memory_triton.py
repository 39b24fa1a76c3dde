"""Every Triton kernel under the memory checker: bounds, what nothing wrote, races.

triton-viz 3.0's sanitizer cannot do it: it takes every branch on the program's index, reports loops
that begin at it, and has no tl.trans before tl.dot, no tl.join and no addresses from tables.
"""

import ast
import importlib
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from equivalence import CASES, run  # noqa: E402
from interpreter_checks import needs_interpreter, overflow_checks  # noqa: E402
from memory_checks import checked_memory  # noqa: E402
from triton.runtime.interpreter import InterpreterError  # noqa: E402

from gptk.ops.adamw import adamw_  # noqa: E402
from gptk.ops.attention import triton_decode, triton_dkdv, triton_dq, triton_impl  # noqa: E402
from gptk.ops.catalog import OPS  # noqa: E402
from gptk.ops.linear_cross_entropy import triton_impl as linear_cross_entropy  # noqa: E402
from gptk.ops.linear_cross_entropy import triton_logits  # noqa: E402
from gptk.ops.triton_launch import launch  # noqa: E402

pytestmark = needs_interpreter

MORE = {
    "attention": [
        dict(B=1, H=4, Hkv=2, Tq=3, Tk=41, D=5, Dv=3, causal=True),  # the keys split over programs
        dict(B=1, H=2, Tq=1, Tk=40, D=8, causal=True, window=30, dropout_p=0.25),
        dict(B=1, H=2, Hkv=1, Tq=17, Tk=33, D=17, causal=True, dropout_p=0.25),
    ],
    "layer_norm": [dict(shape=(9, 8193), residual=True)],  # wider than a block
    "linear": [dict(shape=(70, 8), N=5, activation="gelu")],  # sums over rows of two programs
    "cross_entropy": [dict(N=3, V=4099, label_smoothing=0.1)],
    "linear_cross_entropy": [dict(shape=(21, 12), V=37, bias=True, label_smoothing=0.1)],
}
"""Cases beside the ops' own, in bfloat16, for kernels and branches that these do not reach."""

LEFT_OUT = {"odd_full", "odd_causal", "dropout", "packed"}
"""Of attention's cases, those whose branches and edges others have too: an interpreter is slow."""


def launched(op):
    """The names of the kernels that the modules of an op launch."""
    folder = Path(importlib.import_module(f"gptk.ops.{op}").__file__).parent
    calls = [
        node
        for path in folder.glob("triton_*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "launch"
    ]
    return {call.args[0].id for call in calls}


@pytest.fixture(autouse=True)
def _overflows_are_errors():
    with overflow_checks():
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Attention in tiles of 16 x 16, its keys in parts of 16, logits in tiles of 16 x 16, of 24
    classes at a time: short rows have several of each."""
    for module in (triton_impl, triton_dq, triton_dkdv):
        monkeypatch.setattr(module, "launch_config", lambda *_: (16, 16, 4, 1))
    monkeypatch.setattr(triton_decode, "LEAST_KEYS", 16)
    monkeypatch.setattr(triton_logits, "launch_config", lambda *_: (16, 16, 16, 4, 1))
    monkeypatch.setattr(linear_cross_entropy, "chunk_classes", lambda N, V: 24)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("op", [op for op in OPS if op != "adamw"])
def test_an_op_accesses_what_it_was_given_and_reads_what_was_written(op):
    left_out = LEFT_OUT if op == "attention" else ()
    own = [case for name, case in CASES[op].CASES.items() if name not in left_out]
    cases = [(case, torch.float32) for case in own]
    cases += [(case, torch.bfloat16) for case in MORE.get(op, [])]
    seen = set()
    for case, dtype in cases:
        with checked_memory() as memory:
            run(op, CASES[op].inputs(dtype=dtype, **case), "triton")
        seen |= memory.kernels
    assert launched(op) <= seen, "kernels that no case launched"


def test_adamw_accesses_what_it_was_given_and_reads_what_was_written():
    seen = set()
    for case in CASES["adamw"].CASES.values():
        for dtype in (torch.float32, torch.bfloat16):
            values = CASES["adamw"].inputs(dtype=dtype, **case)
            scale, found = torch.tensor(8.0), torch.tensor(0.0)
            lists = ("params", "grads", "exp_avgs", "exp_avg_sqs", "step", "masters")
            there = [t for name in lists for t in values[name] or ()]
            with checked_memory(there) as memory:
                adamw_(**values, grad_scale=scale, found_inf=found, backend="triton")
            seen |= memory.kernels
    assert launched("adamw") <= seen


@triton.jit
def _copy_kernel(
    y_ptr,
    x_ptr,
    first,
    read,  # elements
    written,
    step,  # between the programs' first elements
    lanes,  # that share an element of y
    BLOCK: tl.constexpr,
):
    at = first + tl.program_id(0) * step + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < read, other=0.0)
    tl.store(y_ptr + at // lanes, x, mask=at < written)


def copy(y, x, first=0, read=13, written=13, step=8, lanes=1):
    launch(_copy_kernel, (2,), x.device, y, x, first, read, written, step, lanes, BLOCK=8)


def room(n=13):
    """Ones amid others: what lies beside them is memory of this process."""
    return torch.ones(n + 32)[16 : n + 16]


def test_the_checker_passes_a_right_kernel():
    with checked_memory() as memory:
        x, y, z = room(), torch.empty(13), torch.empty(13)
        copy(y, x)
        copy(y, y)  # every program its own elements
        z.copy_(y)  # written by torch
        copy(x, z)
    assert memory.kernels == {"_copy_kernel"}
    assert torch.equal(y, torch.ones(13))


@pytest.mark.parametrize(
    "message, make",
    [
        ("reads outside", lambda: dict(y=room(), x=room(), read=14)),
        ("reads outside", lambda: dict(y=room(), x=room(), first=-1)),
        ("reads outside", lambda: dict(y=room(), x=torch.ones(6, 8)[:, :4])),  # between rows
        ("writes outside", lambda: dict(y=room(), x=room(), written=14)),
        ("writes outside", lambda: dict(y=room(), x=room(16), first=-1, read=-1)),
        ("reads what nothing wrote", lambda: dict(y=room(), x=torch.empty(13))),
        ("race, one writes", lambda: dict(y=room(), x=room(), step=4)),
        ("race, one writes", lambda: dict(y=room(), x=room(), lanes=2)),
        ("race, one reads", lambda: dict(zip("yx", overlapping(), strict=True))),
        ("race, one writes", lambda: dict(zip("xy", overlapping(), strict=True))),
    ],
)
def test_the_checker_sees(message, make):
    with checked_memory(), pytest.raises(InterpreterError, match=message):
        copy(**make())


def overlapping():
    """(one, another) of 13 elements, the second 4 further on."""
    both = torch.ones(17)
    return both[4:], both[:13]
