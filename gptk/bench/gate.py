"""Is the answer right? Only then is its speed of interest.

A provider's outputs and gradients are compared with the op's reference in float64 on the same
inputs. Bound: 2 (outputs) or 3 (gradients) times the error of PyTorch's own op in the same dtype,
plus the dtype's rounding noise. The error ratio that the table shows is the largest of the
provider's errors over PyTorch's.
"""

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptk.bench.providers import PYTORCH, TORCH

FORWARD, GRADIENT = 2.0, 3.0
"""How many times PyTorch's own error, in the same dtype, a kernel may make."""


def noise(reference: Tensor, dtype: torch.dtype) -> float:
    """The dtype's own rounding noise at the reference's magnitude."""
    low = reference.to(dtype)
    finite = low[low.isfinite()]
    if not finite.numel():
        return 0.0
    rounding = 2.0 * ((finite + 0.3) - 0.3 - finite).abs().max().double().item()
    # the right answer itself, in this dtype, may be half a unit of the last place off
    return max(rounding, torch.finfo(dtype).eps / 2 * finite.abs().max().double().item())


def error(value: Tensor, reference: Tensor) -> float:
    """The largest absolute difference; another shape, or NaN or inf in one only, is infinite."""
    value, reference = value.double(), reference.double()
    if value.shape != reference.shape:
        return math.inf
    if not value.numel():
        return 0.0
    same = (value == reference) | (value.isnan() & reference.isnan())
    difference = (value - reference).abs().masked_fill(same, 0.0)
    return difference.nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def bound(
    value: Tensor, reference: Tensor, torchs_error: float, factor: float, largest: float = 0.0
) -> float:
    """The error that the value may have: factor x torch's own error, plus rounding noise.

    Args:
        largest: magnitude of the largest gradient of the call. Where the right answer is zero,
            terms of about that size cancel, in whatever order a BLAS adds them.
    """
    zero = reference.numel() > 0 and not reference.any()
    cancelled = torch.finfo(value.dtype).eps * largest if zero else 0.0
    return factor * torchs_error + noise(reference, value.dtype) + cancelled


def accepted(
    value: Tensor, reference: Tensor, torchs: Tensor, factor: float, largest: float = 0.0
) -> bool:
    """True if the value's error is within its bound."""
    limit = bound(value, reference, error(torchs, reference), factor, largest)
    return error(value, reference) <= limit


def magnitude(tensors: Iterable[Tensor]) -> float:
    """The largest finite absolute value of all of them."""
    finite = (t[t.isfinite()].abs() for t in tensors)
    return max((t.max().item() for t in finite if t.numel()), default=0.0)


class Verdict(NamedTuple):
    """passed; ratio: the largest error in units of PyTorch's (NaN where PyTorch makes none)."""

    passed: bool
    ratio: float


def leaves(op: str, values: dict[str, Any]) -> dict[str, Tensor]:
    """The differentiable tensors of a case, as leaves that require gradients."""
    names = importlib.import_module(f"gptk.ops.{op}.cases").DIFFERENTIABLE
    return {
        n: values[n].detach().clone().requires_grad_()
        for n in names
        if isinstance(values.get(n), Tensor)
    }


def upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the outputs: different for each element, exact in 8 bits."""
    return [
        (((torch.arange(o.numel(), device=o.device) * 37 + 11) % 97 - 48) / 32)
        .view(o.shape)
        .to(o.dtype)
        for o in outputs
    ]


def answer(op: str, function: Callable[..., Any], values: dict[str, Any]) -> list[Tensor]:
    """Outputs, then gradients."""
    inputs = leaves(op, values)
    result = function(**{**values, **inputs})
    outputs = result if isinstance(result, tuple) else (result,)
    grads = torch.autograd.grad(outputs, list(inputs.values()), upstream(outputs))
    return [*(o.detach() for o in outputs), *grads]


def judge(op: str, function: Callable[..., Any], values: dict[str, Any], name: str) -> Verdict:
    """Compare a provider with float64."""
    if values.get("dropout_p") and name in (PYTORCH, "compile"):
        return Verdict(True, float("nan"))  # another mask: it is the yardstick, without dropout
    definition = getattr(importlib.import_module("gptk.functional"), op)
    wide = {k: v.double() if _is_float(v) else v for k, v in values.items()}
    truth = answer(op, lambda **v: definition(**v, backend="torch"), wide)
    found = answer(op, function, values)
    plain = {**values, "dropout_p": 0.0} if "dropout_p" in values else values
    exact = truth
    if values.get("dropout_p"):
        exact = answer(op, lambda **v: definition(**v, backend="torch"), {**wide, "dropout_p": 0.0})
    own = answer(op, TORCH[op], plain)
    outputs = len(truth) - len(leaves(op, values))
    largest = magnitude(truth[outputs:])
    passed, ratio = True, 0.0
    for i, (t, f, e, o) in enumerate(zip(truth, found, exact, own, strict=True)):
        ours, theirs = error(f, t), error(o, e)
        limits = (FORWARD, 0.0) if i < outputs else (GRADIENT, largest)
        right = ours <= bound(f, t, theirs, *limits)
        passed = passed and right
        ratio = max(ratio, ours / theirs if theirs else (1.0 if right else math.inf))
    return Verdict(passed, ratio)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
