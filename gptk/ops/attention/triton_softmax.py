"""One step of attention's online softmax in Triton, for the forward kernels.

The exponent is formed as s - top before the change to base 2 that the hardware's exponential needs:
folding log2(e) into the scale saves one multiplication a score, but rounds with the size of s, and
the gradients of scores of size 50 then err three times as much as torch's.
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
from gptk.ops.triton_launch import dot, narrow


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
    s = dot(q, tl.trans(k), tl.zeros((BLOCK_Q, BLOCK_K), acc.dtype)) * factor
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
    p = tl.exp(s - safe_top[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    shrink = tl.exp(top - safe_top)
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
