"""Cases of gelu: what tests, benchmarks and `verify` run."""

from typing import Any

import torch

from gptk.ops.cases import normal

CASES: dict[str, dict[str, Any]] = {
    "one": dict(shape=(1,)),
    "odd": dict(shape=(3, 7, 31)),
    "odd_tanh": dict(shape=(3, 7, 31), approximate="tanh"),
    "wide_range": dict(shape=(1023,), scale=5.0),
    "wide_range_tanh": dict(shape=(1023,), scale=5.0, approximate="tanh"),
}
BENCH: dict[str, dict[str, Any]] = {
    "nano": dict(shape=(768, 512), approximate="tanh"),
    "gpt2": dict(shape=(1024, 3072), approximate="tanh"),
}
DIFFERENTIABLE = ("input",)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    approximate: str = "none",
    scale: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of gelu."""
    return {"input": normal(shape, dtype, seed, scale), "approximate": approximate}


def traffic(shape: tuple[int, ...], itemsize: int, backward: bool, **_: Any) -> int:
    """Bytes that an ideal kernel reads and writes."""
    return itemsize * torch.Size(shape).numel() * (3 if backward else 2)
