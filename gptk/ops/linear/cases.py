"""Cases of linear: what tests, benchmarks and `verify` run."""

from typing import Any

import torch

from gptk.ops.cases import normal

CASES: dict[str, dict[str, Any]] = {
    "one_row": dict(shape=(1, 16), N=8),
    "odd": dict(shape=(2, 5, 7), N=13),
    "no_bias": dict(shape=(9, 24), N=5, bias=False),
    "gelu": dict(shape=(3, 6, 17), N=33, activation="gelu"),
    "gelu_tanh": dict(shape=(19, 8), N=31, activation="gelu_tanh"),
    "gelu_tanh_no_bias": dict(shape=(7, 8), N=9, activation="gelu_tanh", bias=False),
}
BENCH: dict[str, dict[str, Any]] = {
    "nano": dict(shape=(12, 64, 128), N=384),
    "gpt2": dict(shape=(4, 256, 768), N=2304),
}
DIFFERENTIABLE = ("input", "weight", "bias")


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    N: int,
    bias: bool = True,
    activation: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of linear."""
    K = shape[-1]
    return {
        "input": normal(shape, dtype, seed),
        "weight": normal((N, K), dtype, seed + 1, K**-0.5),
        "bias": normal((N,), dtype, seed + 2) if bias else None,
        "activation": activation,
    }


def flops(shape: tuple[int, ...], N: int, backward: bool, **_: Any) -> int:
    """Operations of the matrix products."""
    return 2 * torch.Size(shape).numel() * N * (2 if backward else 1)


def traffic(
    shape: tuple[int, ...],
    N: int,
    itemsize: int,
    backward: bool,
    bias: bool = True,
    activation: str | None = None,
    **_: Any,
) -> int:
    """Bytes that ideal kernels read and write, the product fused with its epilogue.

    forward    x, W, (b) read; y, (pre) written
    backward   dy, x, W, (pre) read; dx, dW, (db) written
    """
    K = shape[-1]
    M = torch.Size(shape).numel() // K
    pre = M * N if activation else 0
    times = 2 if backward else 1
    return itemsize * (times * (M * K + N * K) + N * bias + M * N + pre)


def epilogue_traffic(M: int, N: int, itemsize: int, backward: bool, need_y: bool = False) -> int:
    """Bytes of the activation as a pass of its own, behind a product of cuBLAS.

    forward    pre read; y written
    backward   dy, pre read; dpre, (y again, for mlp) written
    """
    return itemsize * M * N * (3 + need_y if backward else 2)
