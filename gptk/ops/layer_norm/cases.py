"""Cases of layer_norm: what tests, benchmarks and `verify` run."""

from typing import Any

import torch

from gptk.ops.cases import normal

CASES: dict[str, dict[str, Any]] = {
    "one_row": dict(shape=(1, 64)),
    "odd": dict(shape=(2, 7, 33)),
    "width_1": dict(shape=(5, 1)),
    "offset_mean": dict(shape=(6, 100), offset=100.0),
    "no_bias": dict(shape=(9, 48), bias=False),
    "no_affine": dict(shape=(3, 17), weight=False, bias=False),
    "residual": dict(shape=(2, 5, 24), residual=True),
    "residual_dropout": dict(shape=(2, 9, 31), residual=True, dropout_p=0.3),
    "two_dims": dict(shape=(4, 3, 10), dims=2),
}
BENCH: dict[str, dict[str, Any]] = {
    "nano": dict(shape=(12, 64, 128), residual=True),
    "shakespeare": dict(shape=(16, 256, 384), residual=True, dropout_p=0.2),
    "gpt2": dict(shape=(4, 256, 768), residual=True),
}
DIFFERENTIABLE = ("input", "weight", "bias", "residual")


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    dims: int = 1,
    weight: bool = True,
    bias: bool = True,
    residual: bool = False,
    dropout_p: float = 0.0,
    offset: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of layer_norm."""
    tail = shape[-dims:]
    return {
        "input": normal(shape, dtype, seed) + offset,
        "normalized_shape": tail,
        "weight": normal(tail, dtype, seed + 1) + 1.0 if weight else None,
        "bias": normal(tail, dtype, seed + 2) if bias else None,
        "residual": normal(shape, dtype, seed + 3) if residual else None,
        "dropout_p": dropout_p,
        "seed": 2**63 + 12345,
    }


def traffic(
    shape: tuple[int, ...],
    itemsize: int,
    backward: bool,
    residual: bool = False,
    dropout_p: float = 0.0,
    **_: Any,
) -> int:
    """Bytes that an ideal kernel reads and writes, of the tensors with the input's shape.

    forward    x, (residual) read; (h), y written
    backward   dy, (dh), h read; dx, (dresidual, which is dx without dropout) written
    """
    size = itemsize * torch.Size(shape).numel()
    if not backward:
        return size * (4 if residual else 2)
    return size * (3 + residual + bool(residual and dropout_p))
