"""Cases of linear_cross_entropy: what tests, benchmarks and `verify` run."""

from typing import Any

import torch

from gptk.ops.cases import classes, normal

CASES: dict[str, dict[str, Any]] = {
    "one_row": dict(shape=(1, 8), V=17),
    "odd": dict(shape=(2, 7, 12), V=33),
    "bias_sum": dict(shape=(11, 8), V=13, bias=True, ignored=0.3, reduction="sum"),
    "none": dict(shape=(3, 5, 8), V=21, ignored=0.3, reduction="none"),
    "smoothing": dict(shape=(9, 6), V=10, bias=True, label_smoothing=0.2),
    "softcap": dict(shape=(2, 7, 12), V=33, bias=True, softcap=2.0),
    "z_loss": dict(shape=(10, 8), V=21, ignored=0.3, reduction="sum", z_loss=0.1),
    "softcap_z_loss": dict(
        shape=(3, 5, 8),
        V=1100,
        bias=True,
        ignored=0.3,
        label_smoothing=0.1,
        reduction="none",
        softcap=1.5,
        z_loss=1e-2,
    ),
}
BENCH: dict[str, dict[str, Any]] = {
    "char": dict(shape=(768, 128), V=65),
    "gpt2": dict(shape=(1024, 768), V=50304),
}
DIFFERENTIABLE = ("input", "linear_weight", "linear_bias")


def inputs(
    shape: tuple[int, ...],
    V: int,
    dtype: torch.dtype,
    bias: bool = False,
    ignored: float = 0.0,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    seed: int = 0,
    **options: float,
) -> dict[str, Any]:
    """Keyword arguments of linear_cross_entropy; `options`: softcap and z_loss."""
    C = shape[-1]
    return {
        "input": normal(shape, dtype, seed),
        "linear_weight": normal((V, C), dtype, seed + 1, C**-0.5),
        "target": classes(shape[:-1], V, seed + 2, ignored),
        "linear_bias": normal((V,), dtype, seed + 3) if bias else None,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        **options,
    }


def flops(shape: tuple[int, ...], V: int, backward: bool, **_: Any) -> int:
    """Operations of the matrix products, the logits once."""
    return 2 * torch.Size(shape).numel() * V * (2 if backward else 1)
