"""Cases of mlp: what tests, benchmarks and `verify` run."""

from typing import Any

import torch

from gptk.ops.cases import normal

CASES: dict[str, dict[str, Any]] = {
    "one_row": dict(shape=(1, 8)),
    "odd": dict(shape=(2, 5, 7), hidden=29),
    "erf": dict(shape=(6, 12), activation="gelu"),
    "no_bias": dict(shape=(11, 8), bias=False),
    "other_width_out": dict(shape=(3, 8), hidden=16, out=5),
}
BENCH: dict[str, dict[str, Any]] = {
    "nano": dict(shape=(12, 64, 128)),
    "gpt2": dict(shape=(4, 256, 768)),
}
DIFFERENTIABLE = ("input", "fc_weight", "fc_bias", "proj_weight", "proj_bias")


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    hidden: int | None = None,
    out: int | None = None,
    bias: bool = True,
    activation: str | None = "gelu_tanh",
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of mlp."""
    C = shape[-1]
    F, N = hidden or 4 * C, out or C
    return {
        "input": normal(shape, dtype, seed),
        "fc_weight": normal((F, C), dtype, seed + 1, C**-0.5),
        "fc_bias": normal((F,), dtype, seed + 2) if bias else None,
        "proj_weight": normal((N, F), dtype, seed + 3, F**-0.5),
        "proj_bias": normal((N,), dtype, seed + 4) if bias else None,
        "activation": activation,
    }


def flops(shape: tuple[int, ...], backward: bool, hidden: int | None = None, **_: Any) -> int:
    """Operations of the matrix products."""
    C = shape[-1]
    return 4 * torch.Size(shape).numel() * (hidden or 4 * C) * (2 if backward else 1)


def traffic(
    shape: tuple[int, ...],
    itemsize: int,
    backward: bool,
    hidden: int | None = None,
    out: int | None = None,
    bias: bool = True,
    **_: Any,
) -> int:
    """Bytes that ideal kernels read and write, each product fused with its epilogue.

    forward    x, W1, (b1), W2, (b2) read; pre, act(pre), y written, act(pre) read
    backward   dy, x, pre, W1, W2 read; dpre, act(pre) written and read; all gradients written
    """
    C = shape[-1]
    M, F, N = torch.Size(shape).numel() // C, hidden or 4 * C, out or C
    weights, biases = F * C + N * F, (F + N) * bias
    if backward:
        return itemsize * (M * N + 2 * M * C + M * F + 2 * weights + biases + 4 * M * F)
    return itemsize * (M * C + weights + biases + 3 * M * F + M * N)
