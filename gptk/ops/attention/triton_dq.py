"""The gradient of attention's queries in Triton: a program owns queries and runs over keys.

ds = p (dout v^T - delta), dq = ds k scale: see triton_backward. The delta kernel goes before.
"""

import torch
import triton
import triton.language as tl

from gptk.ops.attention.triton_softmax import exponents, in_base, power
from gptk.ops.attention.triton_tiles import (
    edge,
    finite_or_zero,
    keys_of,
    load_tile,
    masked_start,
    others_of,
    sees,
    store_tile,
    touched,
    within,
)
from gptk.ops.philox_triton import keep_tile, philox_key
from gptk.ops.triton_launch import dot, narrow, widen
from gptk.ops.tuning import tuned


def launch_config(D: int, dtype: torch.dtype, kind: str, arch: int) -> tuple[int, ...]:
    """(BLOCK_Q, BLOCK_K, num_warps, num_stages, maxnreg) for the wider of the two head sizes."""
    return tuned("attention", "dq", arch, 8 * dtype.itemsize, D, kind)


@triton.jit(do_not_specialize=["H", "Tq"])
def attention_delta_kernel(
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
    low,
    high,
    k_stride,
    v_stride,
    Tq,
    Tk,
    window,
    factor,
    key_low,
    key_high,
    threshold,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_RANGES: tl.constexpr,
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
    exponent = exponents(dot(q, tl.trans(k), zero), lse[:, None], factor, q.dtype)
    dp = dot(dout, tl.trans(v), zero)
    if HAS_DROPOUT:
        keep = keep_tile(key_low, key_high, row, start, threshold, BLOCK_K)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    if MASKED:
        key = start + tl.arange(0, BLOCK_K)
        if HAS_RANGES:
            seen = within(low[:, None], high[:, None], key[None, :])
        else:
            seen = sees(query[:, None], key[None, :], Tq, Tk, window, CAUSAL, HAS_WINDOW)
        exponent = tl.where(seen, exponent, float("-inf"))
    ds = power(exponent, q.dtype) * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
        # a row that sees a NaN in k has ds = NaN: zeros in its place lose nothing
        dq = dot(narrow(ds, k.dtype), finite_or_zero(k, dq.dtype), dq)
    else:
        dq = dot(narrow(ds, k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["H", "Tq", "Tk", "window", "seed_low", "seed_high"])
def attention_dq_kernel(
    dq_ptr,  # (B, H, Tq, D)
    dout_ptr,  # (B, H, Tq, DV)
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H // GROUP, Tk, D)
    v_ptr,  # (B, H // GROUP, Tk, DV)
    lse_ptr,  # (B, H, Tq) accumulator dtype, contiguous
    delta_ptr,  # (B, H, Tq) accumulator dtype, contiguous
    low_ptr,  # (Tq,): query i sees keys low[i] .. high[i] - 1; None: see CAUSAL, HAS_WINDOW
    high_ptr,
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
    HAS_RANGES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    EDGE: tl.constexpr = edge(BLOCK_K, BLOCK_D, BLOCK_DV)
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
    lse = tl.load(lse_ptr + row, mask=query < Tq, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # a row without keys: nothing is seen
    lse = in_base(lse, q.dtype)
    delta = tl.load(delta_ptr + row, mask=query < Tq, other=0.0)
    factor = tl.full((), scale, ACC)
    keep_factor = tl.full((), keep_scale, ACC)
    key_low, key_high = 0, 0
    if HAS_DROPOUT:
        key_low, key_high = philox_key(seed_low, seed_high)

    dq = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    low, high = 0, 0
    if HAS_RANGES:
        low, high, first, left, full_start, full_end, masked = others_of(
            low_ptr, high_ptr, start_q, Tq, BLOCK_Q, BLOCK_K, EDGE
        )
    else:
        first, left, full_start, full_end, masked = keys_of(
            start_q, Tq, Tk, window, CAUSAL, HAS_WINDOW, BLOCK_Q, BLOCK_K, EDGE
        )
    for start_full in range(full_start, full_end, BLOCK_K):
        start = tl.multiple_of(start_full, BLOCK_K)
        dq = _dq_tile(
            dq, q, dout, lse, delta, k_ptr, v_ptr, start, query, row, low, high, k_strides[2],
            v_strides[2], Tq, Tk, window, factor, key_low, key_high, threshold, keep_factor, D, DV,
            CAUSAL, HAS_WINDOW, HAS_RANGES, HAS_DROPOUT, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
    for index in tl.range(0, masked, num_stages=1):
        start = masked_start(index, first, left, full_end, EDGE)
        if not HAS_RANGES or touched(low, high, start, EDGE):
            dq = _dq_tile(
                dq, q, dout, lse, delta, k_ptr, v_ptr, start, query, row, low, high, k_strides[2],
                v_strides[2], Tq, Tk, window, factor, key_low, key_high, threshold, keep_factor, D,
                DV, CAUSAL, HAS_WINDOW, HAS_RANGES, HAS_DROPOUT, BLOCK_Q, EDGE, BLOCK_D,
                BLOCK_DV, True,
            )  # fmt: skip
    dq = narrow(dq * factor, dq_ptr.dtype.element_ty)
    store_tile(dq_ptr, dq, start_q, dq_strides[2], Tq, D, BLOCK_Q, BLOCK_D)
