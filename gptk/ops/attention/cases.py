"""Cases of attention: what tests, benchmarks and `verify` run."""

from itertools import accumulate
from typing import Any

import torch

from gptk.ops.cases import normal

CASES: dict[str, dict[str, Any]] = {
    "one_token": dict(B=1, H=1, Tq=1, Tk=1, D=16),
    "odd_full": dict(B=2, H=2, Tq=7, Tk=7, D=8),
    "odd_causal": dict(B=1, H=3, Tq=33, Tk=33, D=12, causal=True),
    "cached": dict(B=1, H=2, Tq=3, Tk=19, D=8, causal=True),
    "rows_without_keys": dict(B=1, H=2, Tq=9, Tk=5, D=8, causal=True),
    "dropout": dict(B=2, H=2, Tq=18, Tk=18, D=8, causal=True, dropout_p=0.25),
    "gqa": dict(B=1, H=4, Hkv=2, Tq=17, Tk=17, D=8, causal=True),
    "window": dict(B=1, H=1, Tq=40, Tk=40, D=4, causal=True, window=6),
    "head_1_value_5": dict(B=2, H=3, Tq=6, Tk=11, D=1, Dv=5),
    "scale": dict(B=1, H=1, Tq=5, Tk=9, D=7, scale=1.0),
    "packed": dict(B=1, H=2, Tq=35, Tk=35, D=8, causal=True, q_lengths=(7, 16, 0, 1, 11)),
    "packed_full": dict(
        B=1, H=2, Tq=21, Tk=26, D=8, Dv=5, q_lengths=(6, 0, 12, 3), k_lengths=(9, 4, 13, 0)
    ),
    "packed_cached": dict(
        B=1,
        H=3,
        Hkv=1,
        Tq=20,
        Tk=45,
        D=8,
        causal=True,
        window=5,
        dropout_p=0.25,
        q_lengths=(3, 0, 9, 6, 2),
        k_lengths=(19, 5, 9, 2, 10),
    ),
}
BENCH: dict[str, dict[str, Any]] = {
    "nano": dict(B=12, H=4, Tq=64, Tk=64, D=32, causal=True),
    "shakespeare": dict(B=16, H=6, Tq=256, Tk=256, D=64, causal=True, dropout_p=0.2),
    "gpt2": dict(B=4, H=12, Tq=256, Tk=256, D=64, causal=True),
}
DIFFERENTIABLE = ("query", "key", "value")


def inputs(
    B: int,
    H: int,
    Tq: int,
    Tk: int,
    D: int,
    dtype: torch.dtype,
    Hkv: int | None = None,
    Dv: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | None = None,
    q_lengths: tuple[int, ...] | None = None,
    k_lengths: tuple[int, ...] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of attention; the lengths are those of packed documents."""
    heads = Hkv or H
    lengths = {"cu_seqlens_q": q_lengths, "cu_seqlens_k": k_lengths}
    packed = {
        name: torch.tensor([0, *accumulate(each)], dtype=torch.int32)
        for name, each in lengths.items()
        if each is not None
    }
    return packed | {
        "query": normal((B, H, Tq, D), dtype, seed),
        "key": normal((B, heads, Tk, D), dtype, seed + 1),
        "value": normal((B, heads, Tk, Dv or D), dtype, seed + 2),
        "causal": causal,
        "scale": scale,
        "dropout_p": dropout_p,
        "seed": 2**40 + 77,
        "enable_gqa": heads != H,
        "window": window,
    }


def flops(
    B: int, H: int, Tq: int, Tk: int, D: int, backward: bool, causal: bool = False, **_: Any
) -> int:
    """Operations of the matrix products, half of them where causal."""
    full = 4 * B * H * Tq * Tk * D
    return (full // 2 if causal else full) * (5 if backward else 2) // 2


def traffic(
    B: int,
    H: int,
    Tq: int,
    Tk: int,
    D: int,
    itemsize: int,
    backward: bool,
    Hkv: int | None = None,
    Dv: int | None = None,
    **_: Any,
) -> int:
    """Bytes that an ideal kernel reads and writes.

    forward    q, k, v read; out, lse written
    backward   dout, q, k, v, out, lse read; dq, dk, dv written
    """
    of_q, of_out = B * H * Tq * D, B * H * Tq * (Dv or D)
    of_kv = B * (Hkv or H) * Tk * (D + (Dv or D))
    lse = B * H * Tq * max(itemsize, 4)
    if backward:
        return itemsize * 2 * (of_q + of_kv + of_out) + lse
    return itemsize * (of_q + of_kv + of_out) + lse
