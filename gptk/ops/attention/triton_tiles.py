"""Tiles of attention in Triton: which ones a program visits, how they are read and multiplied.

Causal attention is aligned bottom-right: query i sees keys 0 .. Tk - Tq + i, with a window of w
only the last w of these. A program owns a tile of one side and visits the tiles of the other side
that it sees at all; those it sees in full need no mask, so they have a loop of their own. Tiles
with a mask are narrower, because they hold more at a time: registers are what bounds these kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.attention.ranges import Ranges
from gptk.ops.triton_launch import widen


def kind_of(dropout_p: float, ranges: Ranges | None) -> str:
    """Which rows of tuning.json are for a call: the mask's words and the ranges take registers."""
    return "dropout" if dropout_p > 0.0 else "packed" if ranges is not None else "plain"


@triton.constexpr_function
def edge(BLOCK, BLOCK_D, BLOCK_DV):
    """Width of the tiles with a mask, for the width BLOCK of those without."""
    return min(BLOCK, 16 if max(BLOCK_D, BLOCK_DV) > 128 else 32)


def range_arguments(ranges: Ranges | None, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The kernel arguments of the queries' ranges and of the keys', low and high each.

    64 bits wide for float64: Triton 3.7 lays the operands of a product out by the narrowest number
    that was loaded for them, and has no float64 product in the layout for 32 bits.
    """
    if ranges is None:
        return (None,) * 4
    return tuple(t.to(torch.int64) for t in ranges) if dtype == torch.float64 else ranges


@triton.jit
def sees(query, key, Tq, Tk, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Whether query `query` sees key `key`, for any two shapes that broadcast."""
    keep = (query < Tq) & (key < Tk)
    if CAUSAL:
        last = query + (Tk - Tq)
        keep = keep & (key <= last)
        if HAS_WINDOW:
            keep = keep & (key > last - window)
    return keep


@triton.jit
def visit(some_low, all_low, all_high, some_high, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """(first, left, full_start, full_end, masked): how to visit the tiles of [some_low, some_high).

    Tiles of BLOCK inside [all_low, all_high) are seen in full: [full_start, full_end). `masked`
    tiles of EDGE need a mask; `left` of them begin at `first`, the rest at full_end. EDGE divides
    BLOCK, starts are multiples of the tile's width.
    """
    first = some_low // EDGE * EDGE
    end = tl.cdiv(tl.maximum(some_high, 0), EDGE) * EDGE
    full_start = tl.maximum(tl.minimum(tl.cdiv(all_low, BLOCK) * BLOCK, end), first)
    full_end = tl.maximum(tl.maximum(all_high, 0) // BLOCK * BLOCK, full_start)
    left = (full_start - first) // EDGE
    masked = left + tl.maximum(end - full_end, 0) // EDGE
    return first, left, full_start, full_end, masked


@triton.jit
def keys_of(
    start,
    Tq,
    Tk,
    window,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EDGE: tl.constexpr,
):
    """The key tiles that the queries start .. start + BLOCK_Q - 1 visit."""
    some_low, all_low = 0, 0
    some_high, all_high = Tk, Tk
    if CAUSAL:
        last = tl.minimum(start + BLOCK_Q, Tq) - 1
        some_high = last + (Tk - Tq) + 1
        all_high = start + (Tk - Tq) + 1
        if HAS_WINDOW:
            some_low = tl.maximum(all_high - window, 0)
            all_low = tl.maximum(some_high - window, 0)
    return visit(some_low, all_low, all_high, some_high, BLOCK_K, EDGE)


@triton.jit
def queries_of(
    start,
    Tq,
    Tk,
    window,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EDGE: tl.constexpr,
):
    """The query tiles that the keys start .. start + BLOCK_K - 1 are seen by."""
    some_low, all_low = 0, 0
    some_high, all_high = Tq, Tq
    if CAUSAL:
        last = tl.minimum(start + BLOCK_K, Tk) - 1
        some_low = tl.maximum(start - (Tk - Tq), 0)
        all_low = tl.maximum(last - (Tk - Tq), 0)
        if HAS_WINDOW:
            some_high = tl.minimum(last - (Tk - Tq) + window, Tq)
            all_high = tl.minimum(start - (Tk - Tq) + window, Tq)
    # p of a key past the edge may overflow: no tile of such keys goes without a mask
    all_high = tl.where(start + BLOCK_K > Tk, 0, all_high)
    return visit(some_low, all_low, all_high, some_high, BLOCK_Q, EDGE)


@triton.jit
def others_of(
    low_ptr, high_ptr, start, T, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, EDGE: tl.constexpr
):
    """What owners start .. start + BLOCK - 1 of T visit of the other side, of ranges: (low, high)
    of each owner, (0, 0) past T, and the tiles as keys_of and queries_of give them."""
    owner = start + tl.arange(0, BLOCK)
    low = tl.load(low_ptr + owner, mask=owner < T, other=0).to(tl.int32)
    high = tl.load(high_ptr + owner, mask=owner < T, other=0).to(tl.int32)
    last = tl.minimum(start + BLOCK, T) - 1  # neither end falls from start to last
    some_low, all_low = tl.load(low_ptr + start).to(tl.int32), tl.load(low_ptr + last).to(tl.int32)
    all_high = tl.load(high_ptr + start).to(tl.int32)
    some_high = tl.load(high_ptr + last).to(tl.int32)
    # as in queries_of; a tile of queries would not need it
    all_high = tl.where(start + BLOCK > T, 0, all_high)
    first, left, full_start, full_end, masked = visit(
        some_low, all_low, all_high, some_high, BLOCK_OTHER, EDGE
    )
    return low, high, first, left, full_start, full_end, masked


@triton.jit
def within(low, high, other):
    """Whether `other` is in an owner's range, for any shapes that broadcast."""
    return (other >= low) & (other < high)


@triton.jit
def touched(low, high, start, BLOCK: tl.constexpr):
    """Whether an owner's range meets start .. start + BLOCK - 1: between the ranges of two owners
    of a tile there may be documents of neither."""
    meets = tl.maximum(low, start) < tl.minimum(high, start + BLOCK)
    return tl.max(meets.to(tl.int32), axis=0) > 0


@triton.jit
def masked_start(index, first, left, full_end, BLOCK: tl.constexpr):
    """Where masked tile `index` begins: left of the full ones, then right of them."""
    right = full_end + (index - left) * BLOCK
    return tl.multiple_of(tl.where(index < left, first + index * BLOCK, right), BLOCK)


@triton.jit
def without_keys(query, low, high, Tq, Tk, CAUSAL: tl.constexpr, HAS_RANGES: tl.constexpr):
    """Whether a query sees no key at all."""
    if HAS_RANGES:
        none = low >= high
    elif CAUSAL:
        none = query + (Tk - Tq) < 0
    else:
        none = query < 0  # false: there is a key
    return none


@triton.jit
def divisor(norm, none):
    """What a row's sums are divided by: 1 where `none` is seen, NaN where every score seen is -inf,
    as the softmax is then."""
    return tl.where(none, 1.0, tl.where(norm == 0, float("nan"), norm))


@triton.jit
def load_tile(
    base_ptr,  # (T, D), last stride 1
    start,
    stride,
    T,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr,  # the tile may reach past row T
):
    """Rows start .. start + BLOCK_T - 1 as (BLOCK_T, BLOCK_D), zero past T and past D."""
    row = start + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    at = base_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    if EDGE and D < BLOCK_D:
        tile = tl.load(at, mask=(row < T)[:, None] & (column < D)[None, :], other=0.0)
    elif EDGE:
        tile = tl.load(at, mask=(row < T)[:, None], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(at, mask=(column < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_tile(
    base_ptr,  # (T, D), last stride 1
    tile,
    start,
    stride,
    T,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = start + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    at = base_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, tile, mask=(row < T)[:, None] & (column < D)[None, :])


@triton.jit
def finite_or_zero(b, dtype: tl.constexpr):
    """b with 0 in place of NaN and inf, which would reach rows that do not see them: 0 * NaN."""
    return tl.where(tl.abs(widen(b, dtype)) < float("inf"), b, tl.zeros_like(b))


@triton.jit
def has_bad(b, dtype: tl.constexpr):
    """1 where b holds a NaN or an infinity, else 0."""
    bad = tl.where(tl.abs(widen(b, dtype)) < float("inf"), 0, 1)
    return tl.max(tl.max(bad, axis=1), axis=0)


@triton.jit
def mark_bad(acc, b, seen):
    """acc (R, D) with NaN at [r, d] where row r sees a j with b[j, d] (J, D) not finite: what the
    product with finite_or_zero(b) leaves out. Sets of j are the bits of a word."""
    J: tl.constexpr = b.shape[0]
    tl.static_assert(J <= 32)
    bit = tl.full((), 1, tl.uint32) << tl.arange(0, J).to(tl.uint32)
    zero = tl.full((), 0, tl.uint32)
    finite = tl.abs(widen(b, acc.dtype)) < float("inf")
    bad_set = tl.sum(tl.where(finite, zero, bit[:, None]), axis=0)  # (D,)
    seen_set = tl.sum(tl.where(seen, bit[None, :], zero), axis=1)  # (R,)
    return tl.where((seen_set[:, None] & bad_set[None, :]) != 0, float("nan"), acc)
