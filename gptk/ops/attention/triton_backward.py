"""The backward of attention in Triton, without atomics: delta, then dq, then dk and dv.

With p = exp(q k^T scale - lse), delta = rowsum(dout out), ds = p (dout v^T - delta):
dq = ds k scale, dk = ds^T q scale, dv = p^T dout. The dq kernel owns queries and runs over keys;
the dk/dv kernel owns keys and runs over the queries of every head that shares them. Both form p
again, in base 2, so nothing of size Tq x Tk is stored and every sum has a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.attention.triton_tiles import (
    dot,
    dot_seen,
    keys_of,
    load_tile,
    masked_start,
    queries_of,
    sees,
    store_tile,
)
from gptk.ops.philox_triton import keep_tile, philox_key
from gptk.ops.triton_launch import dropout_arguments, launch, narrow, split_seed, widen

LOG2_E = tl.constexpr(math.log2(math.e))


def launch_config(D: int, itemsize: int) -> tuple[int, int, int, int]:
    """(BLOCK_OWN, BLOCK_OTHER, num_warps, num_stages) of both kernels, for the wider head size."""
    if itemsize == 2:
        if D <= 64:
            return 64, 64, 4, 2
        return (64, 32, 4, 2) if D <= 128 else (32, 32, 8, 1)
    if itemsize == 4:
        return (32, 32, 4, 1) if D <= 64 else (16, 16, 4, 1)
    return 16, 16, 4, 1


@triton.jit(do_not_specialize=["H", "Tq"])
def _attention_delta_kernel(
    delta_ptr,  # (B, H, Tq) accumulator dtype, contiguous
    out_ptr,  # (B, H, Tq, DV)
    dout_ptr,  # (B, H, Tq, DV)
    out_strides,
    dout_strides,
    H,
    Tq,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    ACC: tl.constexpr = delta_ptr.dtype.element_ty
    tiles = tl.cdiv(Tq, BLOCK_Q)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    start = tl.program_id(0) % tiles * BLOCK_Q
    query = start + tl.arange(0, BLOCK_Q)
    out_ptr += b * out_strides[0] + h * out_strides[1]
    dout_ptr += b * dout_strides[0] + h * dout_strides[1]
    out = load_tile(out_ptr, start, out_strides[2], Tq, DV, BLOCK_Q, BLOCK_DV, True)
    dout = load_tile(dout_ptr, start, dout_strides[2], Tq, DV, BLOCK_Q, BLOCK_DV, True)
    delta = tl.sum(widen(out, ACC) * widen(dout, ACC), axis=1)
    tl.store(delta_ptr + head * Tq + query, delta, mask=query < Tq)


@triton.jit
def _dq_tile(
    dq,
    q,
    dout,
    lse,
    delta,
    k_ptr,
    v_ptr,
    start,
    query,
    row,
    k_stride,
    v_stride,
    Tq,
    Tk,
    window,
    scale,
    key_low,
    key_high,
    threshold,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq (without the factor scale) plus what the keys start .. start + BLOCK_K - 1 give."""
    zero = tl.zeros((BLOCK_Q, BLOCK_K), dq.dtype)
    k = load_tile(k_ptr, start, k_stride, Tk, D, BLOCK_K, BLOCK_D, MASKED)
    v = load_tile(v_ptr, start, v_stride, Tk, DV, BLOCK_K, BLOCK_DV, MASKED)
    s = dot(q, tl.trans(k), zero) * scale
    dp = dot(dout, tl.trans(v), zero)
    if HAS_DROPOUT:
        keep = keep_tile(key_low, key_high, row, start, threshold, BLOCK_K)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    if MASKED:
        key = start + tl.arange(0, BLOCK_K)
        seen = sees(query[:, None], key[None, :], Tq, Tk, window, CAUSAL, HAS_WINDOW)
        s = tl.where(seen, s, float("-inf"))
    ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
        dq = dot_seen(narrow(ds, k.dtype), k, seen, dq)
    else:
        dq = dot(narrow(ds, k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["H", "Tq", "Tk", "window", "seed_low", "seed_high"])
def _attention_dq_kernel(
    dq_ptr,  # (B, H, Tq, D)
    dout_ptr,  # (B, H, Tq, DV)
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H // GROUP, Tk, D)
    v_ptr,  # (B, H // GROUP, Tk, DV)
    lse_ptr,  # (B, H, Tq) accumulator dtype, contiguous
    delta_ptr,  # (B, H, Tq) accumulator dtype, contiguous
    dq_strides,
    dout_strides,
    q_strides,
    k_strides,
    v_strides,
    H,
    Tq,
    Tk,
    window,
    scale: tl.float64,
    seed_low,
    seed_high,
    threshold: tl.int64,
    keep_scale: tl.float64,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    tiles = tl.cdiv(Tq, BLOCK_Q)
    tile = tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the last tile has most keys: start it first
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    start_q = tile * BLOCK_Q
    query = start_q + tl.arange(0, BLOCK_Q)
    row = head * Tq + query
    k_ptr += b * k_strides[0] + h // GROUP * k_strides[1]
    v_ptr += b * v_strides[0] + h // GROUP * v_strides[1]
    q_ptr += b * q_strides[0] + h * q_strides[1]
    dout_ptr += b * dout_strides[0] + h * dout_strides[1]
    dq_ptr += b * dq_strides[0] + h * dq_strides[1]
    q = load_tile(q_ptr, start_q, q_strides[2], Tq, D, BLOCK_Q, BLOCK_D, True)
    dout = load_tile(dout_ptr, start_q, dout_strides[2], Tq, DV, BLOCK_Q, BLOCK_DV, True)
    lse = tl.load(lse_ptr + row, mask=query < Tq, other=0.0) * LOG2_E
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # a row without keys: nothing is seen
    delta = tl.load(delta_ptr + row, mask=query < Tq, other=0.0)
    scale_log2 = tl.full((), scale * LOG2_E, ACC)
    keep_factor = tl.full((), keep_scale, ACC)
    key_low, key_high = 0, 0
    if HAS_DROPOUT:
        key_low, key_high = philox_key(seed_low, seed_high)

    dq = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    first, left, full_start, full_end, masked = keys_of(
        start_q, Tq, Tk, window, CAUSAL, HAS_WINDOW, BLOCK_Q, BLOCK_K
    )
    for start_full in range(full_start, full_end, BLOCK_K):
        start = tl.multiple_of(start_full, BLOCK_K)
        dq = _dq_tile(
            dq, q, dout, lse, delta, k_ptr, v_ptr, start, query, row, k_strides[2], v_strides[2],
            Tq, Tk, window, scale_log2, key_low, key_high, threshold, keep_factor, D, DV, CAUSAL,
            HAS_WINDOW, HAS_DROPOUT, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
    for index in range(0, masked):
        start = masked_start(index, first, left, full_end, BLOCK_K)
        dq = _dq_tile(
            dq, q, dout, lse, delta, k_ptr, v_ptr, start, query, row, k_strides[2], v_strides[2],
            Tq, Tk, window, scale_log2, key_low, key_high, threshold, keep_factor, D, DV, CAUSAL,
            HAS_WINDOW, HAS_DROPOUT, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
    dq = narrow(dq * tl.full((), scale, ACC), dq_ptr.dtype.element_ty)
    store_tile(dq_ptr, dq, start_q, dq_strides[2], Tq, D, BLOCK_Q, BLOCK_D)


@triton.jit
def _dkdv_tile(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    start,
    key,
    start_k,
    head,
    q_stride,
    dout_stride,
    Tq,
    Tk,
    window,
    scale,
    key_low,
    key_high,
    threshold,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(dk, dv) without their factors, plus what the queries start .. start + BLOCK_Q - 1 give.

    Scores are held transposed, (BLOCK_K, BLOCK_Q), so that p^T and ds^T are operands as they are.
    """
    query = start + tl.arange(0, BLOCK_Q)
    row = head * Tq + query
    zero = tl.zeros((BLOCK_K, BLOCK_Q), dk.dtype)
    q = load_tile(q_ptr, start, q_stride, Tq, D, BLOCK_Q, BLOCK_D, MASKED)
    dout = load_tile(dout_ptr, start, dout_stride, Tq, DV, BLOCK_Q, BLOCK_DV, MASKED)
    lse = tl.load(lse_ptr + row, mask=query < Tq, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + row, mask=query < Tq, other=0.0)
    s = dot(k, tl.trans(q), zero) * scale
    dp = dot(v, tl.trans(dout), zero)
    if MASKED:
        seen = sees(query[None, :], key[:, None], Tq, Tk, window, CAUSAL, HAS_WINDOW)
        s = tl.where(seen, s, float("-inf"))
        lse = tl.where(lse == float("-inf"), 0.0, lse)  # a row without keys: nothing is seen
    p = tl.exp2(s - lse[None, :])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    p_dropped = p
    if HAS_DROPOUT:
        keep = tl.trans(keep_tile(key_low, key_high, row, start_k, threshold, BLOCK_K))
        p_dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[None, :])
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
        dv = dot_seen(narrow(p_dropped, dout.dtype), dout, seen, dv)
        dk = dot_seen(narrow(ds, q.dtype), q, seen, dk)
    else:
        dv = dot(narrow(p_dropped, dout.dtype), dout, dv)
        dk = dot(narrow(ds, q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["H", "Tq", "Tk", "window", "seed_low", "seed_high"])
def _attention_dkdv_kernel(
    dk_ptr,  # (B, H // GROUP, Tk, D)
    dv_ptr,  # (B, H // GROUP, Tk, DV)
    dout_ptr,  # (B, H, Tq, DV)
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H // GROUP, Tk, D)
    v_ptr,  # (B, H // GROUP, Tk, DV)
    lse_ptr,  # (B, H, Tq) accumulator dtype, contiguous
    delta_ptr,  # (B, H, Tq) accumulator dtype, contiguous
    dk_strides,
    dv_strides,
    dout_strides,
    q_strides,
    k_strides,
    v_strides,
    H,
    Tq,
    Tk,
    window,
    scale: tl.float64,
    seed_low,
    seed_high,
    threshold: tl.int64,
    keep_scale: tl.float64,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    tiles = tl.cdiv(Tk, BLOCK_K)
    start_k = tl.program_id(0) % tiles * BLOCK_K  # the first keys have most queries
    key = start_k + tl.arange(0, BLOCK_K)
    pair = (tl.program_id(0) // tiles).to(tl.int64)  # b * (H // GROUP) + kv head
    b, kv = pair // (H // GROUP), pair % (H // GROUP)
    k_ptr += b * k_strides[0] + kv * k_strides[1]
    v_ptr += b * v_strides[0] + kv * v_strides[1]
    dk_ptr += b * dk_strides[0] + kv * dk_strides[1]
    dv_ptr += b * dv_strides[0] + kv * dv_strides[1]
    k = load_tile(k_ptr, start_k, k_strides[2], Tk, D, BLOCK_K, BLOCK_D, True)
    v = load_tile(v_ptr, start_k, v_strides[2], Tk, DV, BLOCK_K, BLOCK_DV, True)
    scale_log2 = tl.full((), scale * LOG2_E, ACC)
    keep_factor = tl.full((), keep_scale, ACC)
    key_low, key_high = 0, 0
    if HAS_DROPOUT:
        key_low, key_high = philox_key(seed_low, seed_high)

    dk = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_K, BLOCK_DV), ACC)
    first, left, full_start, full_end, masked = queries_of(
        start_k, Tq, Tk, window, CAUSAL, HAS_WINDOW, BLOCK_Q, BLOCK_K
    )
    for member in range(0, GROUP):
        h = kv * GROUP + member
        head = b * H + h
        q_head = q_ptr + b * q_strides[0] + h * q_strides[1]
        dout_head = dout_ptr + b * dout_strides[0] + h * dout_strides[1]
        for start_full in range(full_start, full_end, BLOCK_Q):
            start = tl.multiple_of(start_full, BLOCK_Q)
            dk, dv = _dkdv_tile(
                dk, dv, k, v, q_head, dout_head, lse_ptr, delta_ptr, start, key, start_k, head,
                q_strides[2], dout_strides[2], Tq, Tk, window, scale_log2, key_low, key_high,
                threshold, keep_factor, D, DV, CAUSAL, HAS_WINDOW, HAS_DROPOUT, BLOCK_Q, BLOCK_K,
                BLOCK_D, BLOCK_DV, False,
            )  # fmt: skip
        for index in range(0, masked):
            start = masked_start(index, first, left, full_end, BLOCK_Q)
            dk, dv = _dkdv_tile(
                dk, dv, k, v, q_head, dout_head, lse_ptr, delta_ptr, start, key, start_k, head,
                q_strides[2], dout_strides[2], Tq, Tk, window, scale_log2, key_low, key_high,
                threshold, keep_factor, D, DV, CAUSAL, HAS_WINDOW, HAS_DROPOUT, BLOCK_Q, BLOCK_K,
                BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip
    dk = narrow(dk * tl.full((), scale, ACC), dk_ptr.dtype.element_ty)
    store_tile(dk_ptr, dk, start_k, dk_strides[2], Tk, D, BLOCK_K, BLOCK_D)
    if HAS_DROPOUT:
        dv *= keep_factor
    dv = narrow(dv, dv_ptr.dtype.element_ty)
    store_tile(dv_ptr, dv, start_k, dv_strides[2], Tk, DV, BLOCK_K, BLOCK_DV)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: int | Tensor,
    window: int | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv) in the shapes and dtypes of q, k, v; None where `needs` says False."""
    B, H, Tq, D = q.shape
    Hkv, Tk, DV = v.shape[1:]
    block_own, block_other, num_warps, num_stages = launch_config(max(D, DV), q.element_size())
    block_dv = max(16, triton.next_power_of_2(DV))
    delta = torch.empty_like(lse)
    launch(
        _attention_delta_kernel,
        (triton.cdiv(Tq, 16) * B * H,),
        q.device,
        delta,
        out,
        dout,
        out.stride()[:3],
        dout.stride()[:3],
        H,
        Tq,
        DV=DV,
        BLOCK_Q=16,
        BLOCK_DV=block_dv,
    )
    scalars = (
        H,
        Tq,
        Tk,
        0 if window is None else min(window, Tk),
        scale,
        *split_seed(seed if dropout_p else 0, q.device),
        *dropout_arguments(dropout_p),
    )
    meta = {
        "GROUP": H // Hkv,
        "D": D,
        "DV": DV,
        "CAUSAL": causal,
        "HAS_WINDOW": window is not None,
        "HAS_DROPOUT": dropout_p > 0.0,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_DV": block_dv,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    dq = dk = dv = None
    if needs[0]:
        dq = _empty_like(q)
        arguments = (dq, dout, q, k, v, lse, delta)
        launch(
            _attention_dq_kernel,
            (triton.cdiv(Tq, block_own) * B * H,),
            q.device,
            *arguments,
            *(t.stride()[:3] for t in arguments[:5]),
            *scalars,
            BLOCK_Q=block_own,
            BLOCK_K=block_other,
            **meta,
        )
    if needs[1] or needs[2]:
        dk, dv = _empty_like(k), _empty_like(v)
        arguments = (dk, dv, dout, q, k, v, lse, delta)
        launch(
            _attention_dkdv_kernel,
            (triton.cdiv(Tk, block_own) * B * Hkv,),
            q.device,
            *arguments,
            *(t.stride()[:3] for t in arguments[:6]),
            *scalars,
            BLOCK_Q=block_other,
            BLOCK_K=block_own,
            **meta,
        )
    return dq, dk if needs[1] else None, dv if needs[2] else None


def _empty_like(x: Tensor) -> Tensor:
    """New memory for a (B, H, T, D) tensor, laid out as (B, T, H, D)."""
    B, H, T, D = x.shape
    return torch.empty((B, T, H, D), dtype=x.dtype, device=x.device).transpose(1, 2)
