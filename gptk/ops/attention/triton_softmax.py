"""One step of attention's online softmax in Triton, for the forward kernels.

For 16-bit inputs scores stay as the product leaves them, and exp(scale (s - top)) is one fused
multiply-add and the hardware's exp2: 2^(c s - c top) with c = scale log2(e). How c top is rounded
cancels in a row (from scores of 2^30 on it overflows first, as in FlashAttention-2). How lse is
rounded, in backward, grows with the scores, which float32 inputs would show: gradients of scores of
size 50 would err three times as much as torch's. For those s is multiplied by scale, and s - top
formed before the change of base.
"""

import triton
import triton.language as tl

from gptk.ops.attention.triton_tiles import (
    finite_or_zero,
    has_bad,
    load_tile,
    sees,
    within,
)
from gptk.ops.philox_triton import keep_tile
from gptk.ops.triton_launch import INTERPRETED, LOG2E, dot, exp, narrow, widen


@triton.constexpr_function
def folds(dtype):
    """Whether scores of such inputs are held without the scale."""
    return dtype.primitive_bitwidth == 16


@triton.jit
def signed(q, scale: tl.float64, NEGATIVE: tl.constexpr, ACC: tl.constexpr):
    """(q, factor): q times scale's sign where scores are held without the scale, and its size, so
    that the largest score is that of the largest product."""
    factor = tl.full((), scale, ACC)
    if folds(q.dtype):
        if NEGATIVE:
            q = narrow(-widen(q, ACC), q.dtype)
        factor = tl.abs(factor)
    return q, factor


@triton.jit
def unfolded(top, factor, dtype: tl.constexpr):
    """The largest scores with the scale, for inputs of `dtype`."""
    return top * factor if folds(dtype) else top


@triton.jit
def exponents(s, less, factor, dtype: tl.constexpr):
    """What power() takes to give exp(factor s - less), s the products for inputs of `dtype`; less
    is given as in_base(less, dtype)."""
    if folds(dtype):
        if INTERPRETED:  # which has no fused multiply-add
            exponent = (s.to(tl.float64) * (factor * LOG2E) - less).to(s.dtype)
        else:
            exponent = tl.math.fma(s, factor * LOG2E, -less)
    else:
        exponent = s * factor - less
    return exponent


@triton.jit
def in_base(less, dtype: tl.constexpr):
    """Natural logarithms, to base 2 if scores are held without the scale."""
    return less * LOG2E if folds(dtype) else less


@triton.jit
def power(exponent, dtype: tl.constexpr):
    return tl.exp2(exponent) if folds(dtype) else exp(exponent)


@triton.jit
def softmax_step(
    acc,
    norm,
    top,
    bad,
    q,
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
    """(acc, norm, top, bad) after the keys start .. start+BLOCK_K-1.

    bad is not 0 once a tile with a mask has had a v that is not finite: mark_bad is then to follow.
    """
    k = load_tile(k_ptr, start, k_stride, Tk, D, BLOCK_K, BLOCK_D, MASKED)
    v = load_tile(v_ptr, start, v_stride, Tk, DV, BLOCK_K, BLOCK_DV, MASKED)
    s = dot(q, tl.trans(k), tl.zeros((BLOCK_Q, BLOCK_K), acc.dtype))
    if not folds(q.dtype):
        s = s * factor
    if MASKED:
        key = start + tl.arange(0, BLOCK_K)
        if HAS_RANGES:
            seen = within(low[:, None], high[:, None], key[None, :])
        else:
            seen = sees(query[:, None], key[None, :], Tq, Tk, window, CAUSAL, HAS_WINDOW)
        s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, axis=1))
    # a row of scores of -inf so far, or of none, has top = -inf, and -inf - -inf would be NaN
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    if folds(q.dtype):
        less = safe_top * (factor * LOG2E)
        p = power(exponents(s, less[:, None], factor, q.dtype), q.dtype)
        shrink = power((top - safe_top) * (factor * LOG2E), q.dtype)
    else:
        p = exp(s - safe_top[:, None])
        shrink = exp(top - safe_top)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    norm = norm * shrink + tl.sum(p, axis=1)
    acc = acc * shrink[:, None]
    if HAS_DROPOUT:
        p = tl.where(keep_tile(key_low, key_high, row, start, threshold, BLOCK_K), p, 0.0)
    if MASKED:
        bad |= has_bad(v, acc.dtype)
        acc = dot(narrow(p, v.dtype), finite_or_zero(v, acc.dtype), acc)
    else:
        acc = dot(narrow(p, v.dtype), v, acc)
    return acc, norm, new_top, bad
