"""The gradients of attention's keys and values in Triton: a program owns keys, runs over queries.

dk = ds^T q scale, dv = p^T dout: see triton_backward. The heads that share a key head are summed
inside the program, in order, so no atomics are needed.
"""

import torch
import triton
import triton.language as tl

from gptk.ops.attention.triton_softmax import exponents, in_base, power
from gptk.ops.attention.triton_tiles import (
    finite_or_zero,
    has_bad,
    load_tile,
    mark_bad,
    masked_start,
    others_of,
    queries_of,
    sees,
    store_tile,
    touched,
    within,
)
from gptk.ops.philox_triton import keep_tile, philox_key
from gptk.ops.triton_launch import dot, narrow
from gptk.ops.tuning import tuned


def launch_config(D: int, dtype: torch.dtype, kind: str, arch: int) -> tuple[int, ...]:
    """(BLOCK_Q, BLOCK_K, num_warps, num_stages, maxnreg) for the wider of the two head sizes."""
    return tuned("attention", "dkdv", arch, 8 * dtype.itemsize, D, kind)


@triton.jit
def _dkdv_tile(
    dk,
    dv,
    bad,
    k,
    v,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    start,
    key,
    start_k,
    low,
    high,
    head,
    q_stride,
    dout_stride,
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
    """(dk, dv, bad) plus what the queries start .. start + BLOCK_Q - 1 give, without the factors.

    Scores are held transposed, (BLOCK_K, BLOCK_Q), so that p^T and ds^T are operands as they are.
    """
    query = start + tl.arange(0, BLOCK_Q)
    row = head * Tq + query
    zero = tl.zeros((BLOCK_K, BLOCK_Q), dk.dtype)
    q = load_tile(q_ptr, start, q_stride, Tq, D, BLOCK_Q, BLOCK_D, MASKED)
    dout = load_tile(dout_ptr, start, dout_stride, Tq, DV, BLOCK_Q, BLOCK_DV, MASKED)
    lse = tl.load(lse_ptr + row, mask=query < Tq, other=0.0)
    delta = tl.load(delta_ptr + row, mask=query < Tq, other=0.0)
    s = dot(k, tl.trans(q), zero)
    dp = dot(v, tl.trans(dout), zero)
    if MASKED:
        if HAS_RANGES:
            seen = within(low[:, None], high[:, None], query[None, :])
        else:
            seen = sees(query[None, :], key[:, None], Tq, Tk, window, CAUSAL, HAS_WINDOW)
        lse = tl.where(lse == float("-inf"), 0.0, lse)  # a row without keys: nothing is seen
    exponent = exponents(s, in_base(lse, q.dtype)[None, :], factor, q.dtype)
    if MASKED:
        exponent = tl.where(seen, exponent, float("-inf"))
    p = power(exponent, q.dtype)
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
        bad |= has_bad(dout, dv.dtype)  # rare, and dealt with after the loops
        dv = dot(narrow(p_dropped, dout.dtype), finite_or_zero(dout, dv.dtype), dv)
        # NaN in q: ds is NaN where seen
        dk = dot(narrow(ds, q.dtype), finite_or_zero(q, dk.dtype), dk)
    else:
        dv = dot(narrow(p_dropped, dout.dtype), dout, dv)
        dk = dot(narrow(ds, q.dtype), q, dk)
    return dk, dv, bad


@triton.jit(do_not_specialize=["H", "Tq", "Tk", "window", "seed_low", "seed_high"])
def attention_dkdv_kernel(
    dk_ptr,  # (B, H // GROUP, Tk, D)
    dv_ptr,  # (B, H // GROUP, Tk, DV)
    dout_ptr,  # (B, H, Tq, DV)
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H // GROUP, Tk, D)
    v_ptr,  # (B, H // GROUP, Tk, DV)
    lse_ptr,  # (B, H, Tq) accumulator dtype, contiguous
    delta_ptr,  # (B, H, Tq) accumulator dtype, contiguous
    low_ptr,  # (Tk,): key j is seen by queries low[j] .. high[j] - 1; None: see CAUSAL
    high_ptr,
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
    HAS_RANGES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    EDGE: tl.constexpr = 16  # queries of a tile with a mask: see triton_tiles
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
    factor = tl.full((), scale, ACC)
    keep_factor = tl.full((), keep_scale, ACC)
    key_low, key_high = 0, 0
    if HAS_DROPOUT:
        key_low, key_high = philox_key(seed_low, seed_high)

    dk = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_K, BLOCK_DV), ACC)
    low, high, bad = 0, 0, 0
    if HAS_RANGES:
        low, high, first, left, full_start, full_end, masked = others_of(
            low_ptr, high_ptr, start_k, Tk, BLOCK_K, BLOCK_Q, EDGE
        )
    else:
        first, left, full_start, full_end, masked = queries_of(
            start_k, Tq, Tk, window, CAUSAL, HAS_WINDOW, BLOCK_Q, BLOCK_K, EDGE
        )
    # one loop for the heads that share the keys: nested ones would take some 30 registers
    full = (full_end - full_start) // BLOCK_Q
    for index in range(0, GROUP * full):
        h = kv * GROUP + index // full
        start = tl.multiple_of(full_start + index % full * BLOCK_Q, BLOCK_Q)
        q_head = q_ptr + b * q_strides[0] + h * q_strides[1]
        dout_head = dout_ptr + b * dout_strides[0] + h * dout_strides[1]
        dk, dv, bad = _dkdv_tile(
            dk, dv, bad, k, v, q_head, dout_head, lse_ptr, delta_ptr, start, key, start_k, low,
            high, b * H + h, q_strides[2], dout_strides[2], Tq, Tk, window, factor, key_low,
            key_high, threshold, keep_factor, D, DV, CAUSAL, HAS_WINDOW, HAS_RANGES, HAS_DROPOUT,
            BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
    for index in tl.range(0, GROUP * masked, num_stages=1):
        h = kv * GROUP + index // masked
        start = masked_start(index % masked, first, left, full_end, EDGE)
        q_head = q_ptr + b * q_strides[0] + h * q_strides[1]
        dout_head = dout_ptr + b * dout_strides[0] + h * dout_strides[1]
        if not HAS_RANGES or touched(low, high, start, EDGE):
            dk, dv, bad = _dkdv_tile(
                dk, dv, bad, k, v, q_head, dout_head, lse_ptr, delta_ptr, start, key, start_k, low,
                high, b * H + h, q_strides[2], dout_strides[2], Tq, Tk, window, factor, key_low,
                key_high, threshold, keep_factor, D, DV, CAUSAL, HAS_WINDOW, HAS_RANGES,
                HAS_DROPOUT, EDGE, BLOCK_K, BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip
    if bad != 0:
        for index in tl.range(0, GROUP * masked, num_stages=1):
            h = kv * GROUP + index // masked
            start = masked_start(index % masked, first, left, full_end, EDGE)
            dout_head = dout_ptr + b * dout_strides[0] + h * dout_strides[1]
            dout = load_tile(dout_head, start, dout_strides[2], Tq, DV, EDGE, BLOCK_DV, True)
            query = start + tl.arange(0, EDGE)
            if HAS_RANGES:
                seen = within(low[:, None], high[:, None], query[None, :])
            else:
                seen = sees(query[None, :], key[:, None], Tq, Tk, window, CAUSAL, HAS_WINDOW)
            dv = mark_bad(dv, dout, seen)
    dk = narrow(dk * factor, dk_ptr.dtype.element_ty)
    store_tile(dk_ptr, dk, start_k, dk_strides[2], Tk, D, BLOCK_K, BLOCK_D)
    if HAS_DROPOUT:
        dv *= keep_factor
    dv = narrow(dv, dv_ptr.dtype.element_ty)
    store_tile(dv_ptr, dv, start_k, dv_strides[2], Tk, DV, BLOCK_K, BLOCK_DV)
