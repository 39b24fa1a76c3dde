"""Cases of cross_entropy: what tests, benchmarks and `verify` run."""

from typing import Any

import torch

from gptk.ops.cases import classes, normal

CASES: dict[str, dict[str, Any]] = {
    "one_row": dict(N=1, V=65),
    "odd": dict(N=7, V=33),
    "ignored_sum": dict(N=13, V=17, ignored=0.4, reduction="sum"),
    "none": dict(N=9, V=50, ignored=0.3, reduction="none"),
    "smoothing": dict(N=6, V=11, ignored=0.2, label_smoothing=0.1),
    "large_logits": dict(N=5, V=40, scale=100.0),
    "softcap": dict(N=9, V=50, scale=20.0, softcap=30.0),
    "z_loss": dict(N=9, V=33, ignored=0.3, reduction="none", z_loss=0.1),
    "softcap_z_loss": dict(
        N=7, V=5000, scale=20.0, ignored=0.3, label_smoothing=0.1, softcap=30.0, z_loss=1e-2
    ),
}
BENCH: dict[str, dict[str, Any]] = {
    "char": dict(N=768, V=65),
    "gpt2": dict(N=1024, V=50257),
}
DIFFERENTIABLE = ("input",)


def inputs(
    N: int,
    V: int,
    dtype: torch.dtype,
    ignored: float = 0.0,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    seed: int = 0,
    **options: float,
) -> dict[str, Any]:
    """Keyword arguments of cross_entropy; `options`: those that torch's does not have."""
    return {
        "input": normal((N, V), dtype, seed, scale),
        "target": classes((N,), V, seed + 1, ignored),
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        **options,
    }


def traffic(N: int, V: int, itemsize: int, backward: bool, **_: Any) -> int:
    """Bytes that an ideal kernel reads and writes."""
    return itemsize * N * V * (2 if backward else 1)
