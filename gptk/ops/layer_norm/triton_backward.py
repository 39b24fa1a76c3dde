"""The backward of layer_norm in Triton: input gradients, and a two-stage weight reduction.

With xhat = (h - mean) rstd and g = dy weight:
dh_total = rstd (g - mean(g) - xhat mean(g xhat)) + dh, dweight = sum(dy xhat), dbias = sum(dy).
Stage one: group p of programs sums rows p, p + GROUPS, ... into row p of `partial`; stage two adds
the GROUPS rows in order. GROUPS depends on the shape alone, so the same inputs give the same bits.
Rows of one block do stage one with the input gradients; wider rows in a kernel of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.philox_triton import keep_tile, philox_key
from gptk.ops.triton_launch import (
    ACC,
    architecture,
    dropout_arguments,
    launch,
    narrow,
    split_seed,
    widen,
)
from gptk.ops.tuning import user_row

GROUPS = 256  # about two programs for each multiprocessor of a large GPU


def launch_config(N: int, itemsize: int, crowded: bool = False) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps) for rows of N; `itemsize` is that of the accumulators.

    Rows up to 32 KiB are one block, 16 KiB where a thread holds more than them (is_crowded); wider
    ones are walked in blocks of 8 KiB.
    """
    block_n = max(16, triton.next_power_of_2(N))
    if block_n * itemsize > (16384 if crowded else 32768):
        return 1, 8192 // itemsize, 8
    return max(1, 512 // block_n), block_n, 4 if block_n <= 1024 else 8 if block_n <= 4096 else 16


def is_crowded(has_dropout: bool, dh_itemsize: int, arch: int) -> bool:
    """Whether the mask, or on Blackwell a float32 dh, would not fit beside a row of 32 KiB."""
    return has_dropout or (dh_itemsize >= 4 and arch >= 100)


@triton.jit
def _load_terms(
    dy_ptr,
    h_ptr,
    weight_ptr,
    mean,
    rstd,
    row,
    column,
    M,
    N,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
):
    """(dy, g, xhat) of a tile; rows and columns past the edge have dy = g = 0."""
    mask = (row < M)[:, None] & (column < N)[None, :]
    at = row[:, None] * N + column[None, :]
    dy = widen(tl.load(dy_ptr + at, mask=mask, other=0.0), ACC)
    h = widen(tl.load(h_ptr + at, mask=mask, other=0.0), ACC)
    xhat = (h - mean[:, None]) * rstd[:, None]
    g = dy
    if HAS_WEIGHT:
        g = dy * widen(tl.load(weight_ptr + column, mask=column < N, other=0.0), ACC)[None, :]
    return dy, g, xhat


@triton.jit(do_not_specialize=["M", "seed_low", "seed_high"])
def _layer_norm_backward_kernel(
    dx_ptr,  # (M, N) x's dtype, with HAS_DX
    dresidual_ptr,  # (M, N) residual's dtype, with HAS_DRESIDUAL
    partial_dweight_ptr,  # (programs, N) accumulator dtype, with HAS_DWEIGHT
    partial_dbias_ptr,  # (programs, N) accumulator dtype, with HAS_DBIAS
    dy_ptr,  # (M, N)
    dh_ptr,  # (M, N), with HAS_DH
    h_ptr,  # (M, N)
    weight_ptr,  # (N,), with HAS_WEIGHT
    mean_ptr,  # (M,) accumulator dtype
    rstd_ptr,  # (M,) accumulator dtype
    M,
    N,
    seed_low,
    seed_high,
    threshold: tl.int64,
    keep_scale: tl.float64,
    HAS_DX: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,  # only with ONE_BLOCK
    HAS_DBIAS: tl.constexpr,  # only with ONE_BLOCK
    HAS_DH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    end = BLOCK_N if ONE_BLOCK else N
    zero = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    dweight, dbias = zero, zero
    if HAS_DROPOUT:
        key_low, key_high = philox_key(seed_low, seed_high)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        sum_g, sum_gx = zero, zero
        dy, g, xhat = zero, zero, zero
        for start in range(0, end, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            dy, g, xhat = _load_terms(
                dy_ptr, h_ptr, weight_ptr, mean, rstd, row, column, M, N, HAS_WEIGHT, ACC
            )
            sum_g += g
            sum_gx += g * xhat
        mean_g = tl.sum(sum_g, axis=1) / N
        mean_gx = tl.sum(sum_gx, axis=1) / N
        for start in range(0, end, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            if not ONE_BLOCK:
                dy, g, xhat = _load_terms(
                    dy_ptr, h_ptr, weight_ptr, mean, rstd, row, column, M, N, HAS_WEIGHT, ACC
                )
            mask = (row < M)[:, None] & (column < N)[None, :]
            at = row[:, None] * N + column[None, :]
            d = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
            if HAS_DH:
                d += widen(tl.load(dh_ptr + at, mask=mask, other=0.0), ACC)
            if HAS_DRESIDUAL:
                rounded = narrow(d, dresidual_ptr.dtype.element_ty)
                tl.store(dresidual_ptr + at, rounded, mask=mask)
            if HAS_DX:
                if HAS_DROPOUT:
                    keep = keep_tile(key_low, key_high, row, start, threshold, BLOCK_N)
                    d = tl.where(keep, d * tl.full((), keep_scale, ACC), 0.0)
                tl.store(dx_ptr + at, narrow(d, dx_ptr.dtype.element_ty), mask=mask)
        if HAS_DWEIGHT:
            dweight += dy * xhat
        if HAS_DBIAS:
            dbias += dy
    column = tl.arange(0, BLOCK_N)
    at = tl.program_id(0).to(tl.int64) * N + column
    if HAS_DWEIGHT:
        tl.store(partial_dweight_ptr + at, tl.sum(dweight, axis=0), mask=column < N)
    if HAS_DBIAS:
        tl.store(partial_dbias_ptr + at, tl.sum(dbias, axis=0), mask=column < N)


@triton.jit(do_not_specialize=["M", "groups"])
def _layer_norm_columns_kernel(
    partial_dweight_ptr,  # (groups, N) accumulator dtype, with HAS_DWEIGHT
    partial_dbias_ptr,  # (groups, N) accumulator dtype, with HAS_DBIAS
    dy_ptr,  # (M, N)
    h_ptr,  # (M, N)
    mean_ptr,  # (M,) accumulator dtype
    rstd_ptr,  # (M,) accumulator dtype
    M,
    N,
    groups,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    blocks = tl.cdiv(N, BLOCK_N)
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(0) // blocks
    dweight = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for tile in range(group, tl.cdiv(M, BLOCK_M), groups):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        dy, _, xhat = _load_terms(dy_ptr, h_ptr, h_ptr, mean, rstd, row, column, M, N, False, ACC)
        dweight += dy * xhat
        dbias += dy
    at = group.to(tl.int64) * N + column
    if HAS_DWEIGHT:
        tl.store(partial_dweight_ptr + at, tl.sum(dweight, axis=0), mask=column < N)
    if HAS_DBIAS:
        tl.store(partial_dbias_ptr + at, tl.sum(dbias, axis=0), mask=column < N)


@triton.jit(do_not_specialize=["groups"])
def _layer_norm_reduce_kernel(
    dweight_ptr,  # (N,), with HAS_DWEIGHT
    dbias_ptr,  # (N,), with HAS_DBIAS
    partial_dweight_ptr,  # (groups, N) accumulator dtype
    partial_dbias_ptr,  # (groups, N) accumulator dtype
    groups,
    N,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, groups, BLOCK_M):
        group = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (group < groups)[:, None] & (column < N)[None, :]
        at = group[:, None] * N + column[None, :]
        if HAS_DWEIGHT:
            dweight += tl.load(partial_dweight_ptr + at, mask=mask, other=0.0)
        if HAS_DBIAS:
            dbias += tl.load(partial_dbias_ptr + at, mask=mask, other=0.0)
    if HAS_DWEIGHT:
        total = narrow(tl.sum(dweight, axis=0), dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + column, total, mask=column < N)
    if HAS_DBIAS:
        total = narrow(tl.sum(dbias, axis=0), dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + column, total, mask=column < N)


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    dropout_p: float,
    seed: int | Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias) for dy and dh (M, N); None where `needs` says False."""
    M, N = h.shape
    acc, device = ACC[h.dtype], h.device
    has_dropout = dropout_p > 0.0
    kind = "dropout" if has_dropout else "plain"
    asked = (architecture(device), 8 * h.dtype.itemsize, N, kind)
    crowded = is_crowded(has_dropout, 0 if dh is None else dh.element_size(), asked[0])
    config = user_row("layer_norm.backward", *asked) or launch_config(N, acc.itemsize, crowded)
    block_m, block_n, num_warps = config
    one_block = block_n >= N
    groups = min(triton.cdiv(M, block_m if one_block else 8), GROUPS)
    weight_dtype = h.dtype if weight is None else weight.dtype
    has_dresidual = needs[1] and residual_dtype is not None

    dx = torch.empty((M, N), dtype=x_dtype, device=device) if needs[0] else None
    dresidual = torch.empty((M, N), dtype=residual_dtype, device=device) if has_dresidual else None
    partial_dweight = torch.empty((groups, N), dtype=acc, device=device) if needs[2] else None
    partial_dbias = torch.empty((groups, N), dtype=acc, device=device) if needs[3] else None
    if needs[0] or has_dresidual or (one_block and (needs[2] or needs[3])):
        launch(
            _layer_norm_backward_kernel,
            (groups if one_block else min(M, 65536),),
            device,
            dx,
            dresidual,
            partial_dweight,
            partial_dbias,
            dy,
            dh,
            h,
            weight,
            mean,
            rstd,
            M,
            N,
            *split_seed(seed if dropout_p else 0, device),
            *dropout_arguments(dropout_p),
            HAS_DX=needs[0],
            HAS_DRESIDUAL=has_dresidual,
            HAS_DWEIGHT=one_block and needs[2],
            HAS_DBIAS=one_block and needs[3],
            HAS_DH=dh is not None,
            HAS_WEIGHT=weight is not None,
            HAS_DROPOUT=has_dropout,
            ONE_BLOCK=one_block,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
        )
    if not (needs[2] or needs[3]):
        return dx, dresidual, None, None

    flags = {"HAS_DWEIGHT": needs[2], "HAS_DBIAS": needs[3]}
    partials = (partial_dweight, partial_dbias)
    if not one_block:
        columns_grid = (triton.cdiv(N, 512) * groups,)
        arguments = (*partials, dy, h, mean, rstd, M, N, groups)
        launch(
            _layer_norm_columns_kernel,
            columns_grid,
            device,
            *arguments,
            **flags,
            BLOCK_M=8,
            BLOCK_N=512,
        )
    dweight = torch.empty(N, dtype=weight_dtype, device=device) if needs[2] else None
    dbias = torch.empty(N, dtype=weight_dtype, device=device) if needs[3] else None
    reduce_n = 64 if one_block else 512  # narrow blocks make up for few columns
    launch(
        _layer_norm_reduce_kernel,
        (triton.cdiv(N, reduce_n),),
        device,
        dweight,
        dbias,
        *partials,
        groups,
        N,
        **flags,
        ACC=tl.float64 if acc == torch.float64 else tl.float32,
        BLOCK_M=2048 // reduce_n,
        BLOCK_N=reduce_n,
    )
    return dx, dresidual, dweight, dbias
