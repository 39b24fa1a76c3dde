"""Does a backend compute the reference's function on the device? Error by error, with its bound.

The truth is the op's reference in float64 on the same inputs; the bound is that of gptk.bench.gate:
2 (outputs) or 3 (gradients) times PyTorch's own error in the same dtype, plus rounding noise.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gptk.functional as GF
from benchmarks.gpu import shapes
from benchmarks.gpu.job import Job
from gptk.bench import gate, providers
from gptk.ops.adamw import adamw_

OWN = ("softcap", "z_loss", "window", "cu_seqlens_q", "cu_seqlens_k")
"""Options that PyTorch's ops do not have: the yardstick is then the reference in the same dtype."""


class Found(NamedTuple):
    """One tensor: its error, PyTorch's own, the bound that the two give."""

    name: str
    error: float
    torchs: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


class Answers(NamedTuple):
    """The same call four ways, tensor by tensor; outputs first, then gradients. `exact` is what
    `torchs` is held against: the truth, but without dropout, whose mask is gptk's own."""

    names: list[str]
    outputs: int
    truth: list[Tensor]
    exact: list[Tensor]
    torchs: list[Tensor]


def answers(op: str, values: dict[str, Any]) -> Answers:
    """Truth and yardstick of a call."""
    wide = shapes.convert(values, torch.float64)
    plain = {**values, "dropout_p": 0.0} if values.get("dropout_p") else values
    truth = gate.answer(op, reference(op), wide)
    exact = truth
    if plain is not values:
        exact = gate.answer(op, reference(op), shapes.convert(plain, torch.float64))
    own = gate.answer(op, yardstick(op, values), plain)
    leaves = list(gate.leaves(op, values))
    outputs = len(truth) - len(leaves)
    names = [f"output {i}" for i in range(outputs)] + [f"d{name}" for name in leaves]
    return Answers(names, outputs, truth, exact, own)


def reference(op: str) -> Callable[..., Any]:
    function = getattr(GF, op)
    return lambda **values: function(**values, backend="torch")


def yardstick(op: str, values: dict[str, Any]) -> Callable[..., Any]:
    """PyTorch's fused op where it computes this call, else the reference."""
    same_length = op != "attention" or values["query"].shape[2] == values["key"].shape[2]
    has_own = any(values.get(name) is not None for name in OWN)
    two_dims = len(values.get("normalized_shape", ())) > 1
    plain = same_length and not has_own and not two_dims
    return providers.TORCH[op] if plain else reference(op)


def judge(known: Answers, found: list[Tensor]) -> list[Found]:
    """Every tensor of an answer held against its bound."""
    # flat, because the places of a matrix's finite elements take twice the memory of a vector's
    largest = gate.magnitude(t.flatten() for t in known.truth[known.outputs :])
    made = []
    for i, (name, y) in enumerate(zip(known.names, found, strict=True)):
        torchs = gate.error(known.torchs[i], known.exact[i])
        limits = (gate.FORWARD, 0.0) if i < known.outputs else (gate.GRADIENT, largest)
        bound = gate.bound(y, known.truth[i].flatten(), torchs, *limits)
        made.append(Found(name, gate.error(y, known.truth[i]), torchs, bound))
    return made


def compare(op: str, values: dict[str, Any], backend: str = "triton") -> list[Found]:
    """The backend's outputs and gradients of one call, held against their bounds."""
    function = getattr(GF, op)
    found = gate.answer(op, lambda **v: function(**v, backend=backend), values)
    return judge(answers(op, values), found)


def compare_adamw(values: dict[str, Any], backend: str = "triton") -> list[Found]:
    """One update, float32's error in PyTorch's arithmetic as the yardstick."""
    truth, own = (updated(widened(values, d), "torch") for d in (torch.float64, torch.float32))
    made = []
    for name, y in updated(values, backend).items():
        torchs = gate.error(own[name].to(y.dtype), truth[name])
        bound = gate.bound(y, truth[name], torchs, gate.FORWARD)
        made.append(Found(name, gate.error(y, truth[name]), torchs, bound))
    return made


def updated(values: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """name -> what one update leaves, all parameters in one; `values` stay as they are."""
    copies: dict[str, Any] = {
        k: [t if t is None else t.clone() for t in v] if isinstance(v, list) else v
        for k, v in values.items()
    }
    adamw_(**copies, backend=backend)
    copies["kept"] = copies["masters"] or copies["params"]
    names = ("kept", "params", "exp_avgs", "exp_avg_sqs")
    return {name: torch.cat([t.flatten() for t in copies[name]]) for name in names}


def widened(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The parameters (their masters, where they have some), moments and gradients in dtype."""
    lists = {**values, "params": values["masters"] or values["params"], "masters": None}
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        lists[name] = [t.to(dtype) for t in lists[name]]
    return lists


def wrong(answer: Tensor) -> dict[str, Tensor]:
    """Answers that a bound has to reject."""
    made = {"zero": torch.zeros_like(answer), "negated": -answer, "doubled": 2 * answer}
    if answer.dim() and answer.shape[0] > 1:
        made["permuted"] = answer.roll(1, 0)
    return made


def run(job: Job) -> None:
    """The stage: GPT-2's sizes in three dtypes, the first of each op's cases."""
    op = job.part
    cases = [name for name in shapes.case_names(op, job.dry) if name.startswith("gpt2")]
    for case, dtype in itertools.product(cases[:2], shapes.DTYPES):
        kind = shapes.DTYPES[dtype]
        values = shapes.inputs(op, case, kind, job.device, job.dry)
        try:
            found = compare_adamw(values) if op == "adamw" else compare(op, values)
        except Exception as error:  # a row like any other: the next dtype may be right
            found = [Found(f"it does not run: {first_line(error)}", math.inf, 0.0, 0.0)]
        for one in found:
            row = dict(op=op, case=case, dtype=dtype, tensor=one.name, passed=one.passed)
            job.add(**row, error=one.error, torchs=one.torchs, bound=one.bound)


def first_line(error: Exception) -> str:
    """What it is and the first line of what it says."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0][:200] if words else ''}"
