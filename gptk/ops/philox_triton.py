"""Random words and keep masks inside Triton kernels: Philox4x32-10, bit for bit gptk.random's.

Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405. Key = the 64-bit seed, counter =
(column // 4, row low 32 bits, row high 32 bits, last), lane = column % 4; last is 0 for a keep
mask. One call of the generator serves four neighbouring columns. Products are formed in 64 bits:
one wide multiply on a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def philox_key(seed_low, seed_high):
    """(key low, key high), uint32, from the arguments that triton_launch.split_seed makes."""
    if seed_low.dtype.is_ptr():
        seed = tl.load(seed_low).to(tl.uint64, bitcast=True)
        low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    else:
        low = seed_low.to(tl.uint32, bitcast=True)
        high = seed_high.to(tl.uint32, bitcast=True)
    return low, high


@triton.jit
def philox4x32(key_low, key_high, c0, c1, c2, c3):
    """Ten rounds on uint32 counters of one shape; returns four uint32 words."""
    for _ in tl.static_range(10):
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ key_low
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ key_high
        c1 = second.to(tl.uint32)
        c3 = first.to(tl.uint32)
        # 64-bit sums: a 32-bit one would wrap, which overflow checks take for an error
        key_low = (key_low.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        key_high = (key_high.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def word_tile(
    key_low,
    key_high,
    row,  # (R,) int64
    column,  # first column of the tile, a multiple of 4
    last,  # uint32, or 0
    COLUMNS: tl.constexpr,  # a power of two >= 4
):
    """The words of rows `row`, columns column .. column + COLUMNS - 1: (R, COLUMNS) uint32."""
    R: tl.constexpr = row.shape[0]
    group = (column // 4 + tl.arange(0, COLUMNS // 4))[None, :].to(tl.uint32)
    zero = tl.zeros((R, COLUMNS // 4), tl.uint32)
    row_low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None] + zero
    row_high = (row >> 32).to(tl.uint32)[:, None] + zero
    fourth = zero + last
    w0, w1, w2, w3 = philox4x32(key_low, key_high, group + zero, row_low, row_high, fourth)
    # the last two axes of the joined tile are (lane // 2, lane % 2)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(R, COLUMNS)


@triton.jit
def keep_tile(
    key_low,
    key_high,
    row,  # (R,) int64
    column,  # first column of the tile, a multiple of 4
    threshold,  # round(p * 2**32), at most 2**32
    COLUMNS: tl.constexpr,  # a power of two >= 4
):
    """The keep mask of rows `row` and columns column .. column + COLUMNS - 1: (R, COLUMNS) bool."""
    words = word_tile(key_low, key_high, row, column, 0, COLUMNS)
    return words.to(tl.int64) >= threshold
