"""layer_norm in Triton: residual add, dropout and normalisation in one pass over memory.

A program holds BLOCK_M whole rows in registers when a row fits one block (N <= 8192 in float32)
and otherwise walks its row in blocks, three times forward. The variance is the corrected two-pass
one (Chan, Golub, LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115): with d = h - mean',
mean = mean' + sum(d)/N and var = sum(d^2)/N - (sum(d)/N)^2, so a constant row has deviation
exactly 0. Traffic of a one-block row: x, residual and weights read once, h and y written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.layer_norm.triton_backward import backward
from gptk.ops.philox_triton import keep_tile, philox_key
from gptk.ops.triton_launch import (
    ACC,
    architecture,
    dropout_arguments,
    launch,
    narrow,
    split_seed,
    why_not,
    widen,
)
from gptk.ops.tuning import user_row

__all__ = ["backward", "forward", "launch_config", "unsupported"]


def launch_config(N: int, itemsize: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps) for rows of N; `itemsize` is that of the accumulators.

    Rows up to 32 KiB are one block, wider ones are walked in blocks of 16 KiB.
    """
    block_n = max(16, triton.next_power_of_2(N))
    if block_n * itemsize > 32768:
        return 1, 16384 // itemsize, 16
    return max(1, 1024 // block_n), block_n, 4 if block_n <= 2048 else 8 if block_n <= 4096 else 16


@triton.jit(do_not_specialize=["M", "seed_low", "seed_high"])
def _layer_norm_forward_kernel(
    y_ptr,  # (M, N) h's dtype
    h_ptr,  # (M, N), with HAS_RESIDUAL
    mean_ptr,  # (M,) accumulator dtype
    rstd_ptr,  # (M,) accumulator dtype
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N), with HAS_RESIDUAL
    weight_ptr,  # (N,), with HAS_WEIGHT
    bias_ptr,  # (N,), with HAS_BIAS
    M,
    N,
    eps: tl.float64,
    seed_low,
    seed_high,
    threshold: tl.int64,
    keep_scale: tl.float64,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,  # only with HAS_RESIDUAL
    ONE_BLOCK: tl.constexpr,  # N <= BLOCK_N: the row stays in registers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    end = BLOCK_N if ONE_BLOCK else N
    if HAS_DROPOUT:
        key_low, key_high = philox_key(seed_low, seed_high)

    h = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = (row < M)[:, None] & (column < N)[None, :]
        at = row[:, None] * N + column[None, :]
        h = widen(tl.load(x_ptr + at, mask=mask, other=0.0), ACC)
        if HAS_DROPOUT:
            keep = keep_tile(key_low, key_high, row, start, threshold, BLOCK_N)
            h = tl.where(keep, h * tl.full((), keep_scale, ACC), 0.0)
        if HAS_RESIDUAL:
            h += widen(tl.load(residual_ptr + at, mask=mask, other=0.0), ACC)
            rounded = narrow(h, h_ptr.dtype.element_ty)
            tl.store(h_ptr + at, rounded, mask=mask)
            h = widen(rounded, ACC)  # statistics are those of the h that is handed on
        total += h
    mean = tl.sum(total, axis=1) / N

    if ONE_BLOCK or not HAS_RESIDUAL:
        stream_ptr = x_ptr
    else:
        stream_ptr = h_ptr
        tl.debug_barrier()  # a thread may read back what another one of the program stored
    first = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    second = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = (row < M)[:, None] & (column < N)[None, :]
        if not ONE_BLOCK:
            at = row[:, None] * N + column[None, :]
            h = widen(tl.load(stream_ptr + at, mask=mask, other=0.0), ACC)
        deviation = tl.where(mask, h - mean[:, None], 0.0)  # padding lanes do not count
        first += deviation
        second += deviation * deviation
    shift = tl.sum(first, axis=1) / N
    var = tl.sum(second, axis=1) / N - shift * shift
    var = tl.where(var < 0, 0.0, var)
    mean += shift
    rstd = tl.rsqrt(var + tl.full((), eps, ACC))
    tl.store(mean_ptr + row, mean, mask=row < M)
    tl.store(rstd_ptr + row, rstd, mask=row < M)

    for start in range(0, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = (row < M)[:, None] & (column < N)[None, :]
        at = row[:, None] * N + column[None, :]
        if not ONE_BLOCK:
            h = widen(tl.load(stream_ptr + at, mask=mask, other=0.0), ACC)
        y = (h - mean[:, None]) * rstd[:, None]
        if HAS_WEIGHT:
            y *= widen(tl.load(weight_ptr + column, mask=column < N, other=0.0), ACC)[None, :]
        if HAS_BIAS:
            y += widen(tl.load(bias_ptr + column, mask=column < N, other=0.0), ACC)[None, :]
        tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=mask)


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """None if these kernels run on tensors of this device type, else the reason."""
    return why_not(device_type)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    seed: int | Tensor,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, h, mean, rstd) of x (M, N): h = residual + dropout(x), None without residual; y_dtype:
    default h's."""
    assert residual is not None or dropout_p == 0.0
    M, N = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty((M, N), dtype=y_dtype or dtype, device=x.device)
    h = None if residual is None else torch.empty((M, N), dtype=dtype, device=x.device)
    mean = torch.empty(M, dtype=ACC[dtype], device=x.device)
    rstd = torch.empty_like(mean)
    kind = "dropout" if dropout_p > 0.0 else "plain"
    asked = (architecture(x.device), 8 * dtype.itemsize, N, kind)
    config = user_row("layer_norm.forward", *asked) or launch_config(N, mean.element_size())
    block_m, block_n, num_warps = config
    launch(
        _layer_norm_forward_kernel,
        (triton.cdiv(M, block_m),),
        x.device,
        y,
        h,
        mean,
        rstd,
        x,
        residual,
        weight,
        bias,
        M,
        N,
        eps,
        *split_seed(seed if dropout_p else 0, x.device),
        *dropout_arguments(dropout_p),
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_DROPOUT=dropout_p > 0.0,
        ONE_BLOCK=block_n >= N,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
    return y, h, mean, rstd
