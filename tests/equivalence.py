"""How equivalence is judged: error against float64, measured in PyTorch's own error."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import gptk.functional as GF
from gptk.bench.gate import FORWARD, GRADIENT, accepted, error, magnitude, noise
from gptk.ops.catalog import OPS
from gptk.ops.contract import availability, why_not

FUNCTIONS = {name: getattr(GF, name) for name in OPS if name != "adamw"}
CASES = {op: importlib.import_module(f"gptk.ops.{op}.cases") for op in OPS}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNELS = ("cpp", "triton")
__all__ = [
    "FORWARD",
    "GRADIENT",
    "accepted",
    "error",
    "magnitude",
    "noise",
]  # one gate for tests and benchmarks
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def missing(op: str, backend: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why this backend cannot run here (a reason to skip), or None."""
    return why_not(op, backend, DEVICE, dtype)


def require(backend: str, op: str | None = None) -> str:
    """The backend, or a skip that says why it cannot run here."""
    reason = availability(backend) if op is None else missing(op, backend)
    if reason is not None:
        pytest.skip(reason)
    return backend


def wrong_answers(reference: Tensor) -> dict[str, Tensor]:
    """Answers that a gate has to reject."""
    wrong = {
        "zero": torch.zeros_like(reference),
        "negated": -reference,
        "doubled": 2 * reference,
    }
    if reference.dim() and reference.shape[0] > 1:
        wrong["permuted"] = reference.roll(1, 0)
        wrong["one row missing"] = reference.clone()
        largest = reference.flatten(1).abs().amax(1) if reference.dim() > 1 else reference.abs()
        wrong["one row missing"][largest.argmax()] = 0
    return wrong


def tensors(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    """The differentiable inputs that this case has."""
    return {n: values[n] for n in names if isinstance(values.get(n), Tensor)}


def convert(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same arguments with every floating-point tensor in dtype."""
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in values.items()
    }


def run(
    op: str,
    values: dict[str, Any],
    backend: str,
    required: tuple[str, ...] | None = None,
    upstream: list[Tensor] | None = None,
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs and gradients; `required` names the inputs that need one (None: all)."""
    names = tensors(values, CASES[op].DIFFERENTIABLE)
    required = tuple(names) if required is None else required
    leaves = {n: t.detach().requires_grad_(n in required) for n, t in names.items()}
    result = FUNCTIONS[op](**{**values, **leaves}, backend=backend)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if required:
        ups = upstream or upstreams(outputs)
        torch.autograd.backward(outputs, [u.to(o.dtype) for u, o in zip(ups, outputs, strict=True)])
    return [o.detach() for o in outputs], {n: t.grad for n, t in leaves.items()}


def upstreams(outputs: list[Tensor]) -> list[Tensor]:
    """Upstream gradients whose elements all differ, exact in every dtype up to 8 bits."""
    made = []
    for shift, output in enumerate(outputs):
        n = torch.arange(output.numel(), dtype=torch.int64)
        made.append(((((n * 37 + 11 + shift) % 97) - 48).double() / 32).view(output.shape))
    return made
