"""attention of a few queries over many keys in Triton, as in decoding: the keys are split.

A program of the usual forward runs over all keys of a tile of queries, so few queries leave most of
a GPU idle. Here a program takes one part of the keys of one key head, with the queries of all heads
that share it packed into the rows of its tile: k and v are read once for a key head (where the rows
fill several tiles, once for each). It leaves its unnormalised sum, its largest score and its sum of
exponentials; a second kernel adds the parts of each row, in order. Traffic: k and v once, and
DV + 2 numbers of every row and part twice.

Flash-Decoding (Dao, Haziza, Massa, Sizov 2023, https://pytorch.org/blog/flash-decoding/).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.attention.triton_softmax import signed, softmax_step, unfolded
from gptk.ops.attention.triton_tiles import (
    divisor,
    edge,
    load_tile,
    mark_bad,
    masked_start,
    sees,
    visit,
    without_keys,
)
from gptk.ops.philox_triton import philox_key
from gptk.ops.triton_launch import ACC, dropout_arguments, exp, launch, narrow, options, split_seed

FEW_QUERIES = 16
PROGRAMS = 256  # about two for each multiprocessor of the largest GPUs
LEAST_KEYS = 256  # of one part: shorter ones cost more in the second pass than they save
MOST_PARTS = tl.constexpr(64)  # the second kernel holds this many at once


def parts_of(B: int, Hkv: int, keys: int) -> int:
    """Into how many parts to split `keys` keys: a function of sizes alone, so results repeat."""
    wanted = triton.cdiv(PROGRAMS, max(B * Hkv, 1))
    return max(1, min(wanted, triton.cdiv(keys, LEAST_KEYS), MOST_PARTS.value))


def first_key(Tq: int, Tk: int, window: int | None) -> int:
    """The first key that any query sees."""
    return 0 if window is None else max(Tk - Tq + 1 - window, 0)


def pays(B: int, Hkv: int, Tq: int, Tk: int, window: int | None) -> bool:
    """Whether `forward` here is to run: few queries, and keys and idle programs to split over."""
    return Tq <= FEW_QUERIES and parts_of(B, Hkv, Tk - first_key(Tq, Tk, window)) > 1


def launch_config(D: int, itemsize: int, group: int, dropout: bool) -> tuple[int, int, int, int]:
    """(BLOCK_R, BLOCK_K, num_warps, num_stages) for the wider of the two head sizes and the heads
    that share a key head. Reasoned, not timed; `make aot` says what the bfloat16 ones need.
    """
    if itemsize == 2:
        rows = 16 if group == 1 else 32 if group == 2 or D > 128 else 64
        keys = 32 if dropout or D > 128 else 64
        return rows, keys, 4 if D <= 64 and rows < 64 else 8, 2
    if itemsize == 4:
        return 16, 32 if D <= 64 else 16, 8, 2
    return 16, 16, 8, 1


@triton.jit(
    do_not_specialize=[
        "H", "Tq", "Tk", "window", "parts", "begin", "part_keys", "seed_low", "seed_high"
    ]
)  # fmt: skip
def _attention_part_kernel(
    acc_ptr,  # (parts, B, H, Tq, DV) accumulator dtype, contiguous
    top_ptr,  # (parts, B, H, Tq) accumulator dtype, contiguous: the largest score
    norm_ptr,  # (parts, B, H, Tq) accumulator dtype, contiguous: the sum of exp(score - top)
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H // GROUP, Tk, D)
    v_ptr,  # (B, H // GROUP, Tk, DV)
    q_strides,  # (b, h, t) of each: the last stride is 1
    k_strides,
    v_strides,
    rows: tl.int64,  # B * H * Tq
    H,
    Tq,
    Tk,
    window,
    parts,
    begin,  # of the first part: a multiple of BLOCK_K
    part_keys,  # a multiple of BLOCK_K
    scale: tl.float64,
    seed_low,
    seed_high,
    threshold: tl.int64,
    GROUP: tl.constexpr,  # query heads for each key head
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr,  # scale is
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    ACC: tl.constexpr = acc_ptr.dtype.element_ty
    EDGE: tl.constexpr = edge(BLOCK_K, BLOCK_D, BLOCK_DV)
    part = tl.program_id(0) % parts
    tiles = tl.cdiv(GROUP * Tq, BLOCK_R)
    tile = tl.program_id(0) // parts % tiles
    pair = (tl.program_id(0) // parts // tiles).to(tl.int64)  # b * (H // GROUP) + kv head
    b, kv = pair // (H // GROUP), pair % (H // GROUP)
    # rows are (head of the group, query), in the order of the mask's rows and of lse
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    present = r < GROUP * Tq
    h = kv * GROUP + r // Tq
    query = r % Tq
    column, value_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at = q_ptr + b * q_strides[0] + h * q_strides[1] + query.to(tl.int64) * q_strides[2]
    q = tl.load(
        at[:, None] + column[None, :], mask=present[:, None] & (column < D)[None, :], other=0.0
    )
    query = tl.where(present, query, Tq)  # which sees nothing
    row = (b * H + kv * GROUP) * Tq + r
    k_ptr += b * k_strides[0] + kv * k_strides[1]
    v_ptr += b * v_strides[0] + kv * v_strides[1]
    q, factor = signed(q, scale, NEGATIVE, ACC)
    key_low, key_high = 0, 0
    if HAS_DROPOUT:
        key_low, key_high = philox_key(seed_low, seed_high)

    # of the keys that all queries see, and those that some see, the ones of this part
    some_low, all_low = begin + part * part_keys, 0
    some_high = tl.minimum(some_low + part_keys, Tk)
    all_high = some_high
    if CAUSAL:
        all_high = tl.minimum(all_high, Tk - Tq + 1)
        if HAS_WINDOW:
            all_low = tl.maximum(Tk - window, 0)
    first, left, full_start, full_end, masked = visit(
        some_low, all_low, all_high, some_high, BLOCK_K, EDGE
    )
    acc = tl.zeros((BLOCK_R, BLOCK_DV), ACC)
    norm = tl.zeros((BLOCK_R,), ACC)
    top = tl.full((BLOCK_R,), float("-inf"), ACC)
    bad = 0
    for start_full in range(full_start, full_end, BLOCK_K):
        start = tl.multiple_of(start_full, BLOCK_K)
        acc, norm, top, bad = softmax_step(
            acc, norm, top, bad, q, k_ptr, v_ptr, start, query, row, 0, 0, k_strides[2],
            v_strides[2], Tq, Tk, window, factor, key_low, key_high, threshold, D, DV, CAUSAL,
            HAS_WINDOW, False, HAS_DROPOUT, BLOCK_R, BLOCK_K, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
    for index in tl.range(0, masked, num_stages=1):
        start = masked_start(index, first, left, full_end, EDGE)
        acc, norm, top, bad = softmax_step(
            acc, norm, top, bad, q, k_ptr, v_ptr, start, query, row, 0, 0, k_strides[2],
            v_strides[2], Tq, Tk, window, factor, key_low, key_high, threshold, D, DV, CAUSAL,
            HAS_WINDOW, False, HAS_DROPOUT, BLOCK_R, EDGE, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
    if bad != 0:
        for index in tl.range(0, masked, num_stages=1):
            start = masked_start(index, first, left, full_end, EDGE)
            v = load_tile(v_ptr, start, v_strides[2], Tk, DV, EDGE, BLOCK_DV, True)
            key = start + tl.arange(0, EDGE)
            seen = sees(query[:, None], key[None, :], Tq, Tk, window, CAUSAL, HAS_WINDOW)
            acc = mark_bad(acc, v, seen)

    place = part * rows + row
    tl.store(top_ptr + place, unfolded(top, factor, q.dtype), mask=present)
    tl.store(norm_ptr + place, norm, mask=present)
    at = acc_ptr + place[:, None] * DV + value_column[None, :]
    tl.store(at, acc, mask=present[:, None] & (value_column < DV)[None, :])


@triton.jit(do_not_specialize=["H", "Tq", "Tk", "parts"])
def _attention_join_kernel(
    out_ptr,  # (B, H, Tq, DV)
    lse_ptr,  # (B, H, Tq) accumulator dtype, contiguous
    acc_ptr,  # as the parts' kernel leaves them
    top_ptr,
    norm_ptr,
    out_strides,
    rows: tl.int64,  # B * H * Tq
    H,
    Tq,
    Tk,
    parts,
    keep_scale: tl.float64,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    MOST: tl.constexpr,  # a power of two >= parts
    BLOCK_DV: tl.constexpr,
):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, MOST), tl.arange(0, BLOCK_DV)
    place = part * rows + row
    there = part < parts
    tops = tl.load(top_ptr + place, mask=there, other=float("-inf"))
    norms = tl.load(norm_ptr + place, mask=there, other=0.0)
    at = acc_ptr + place[:, None] * DV + column[None, :]
    accs = tl.load(at, mask=there[:, None] & (column < DV)[None, :], other=0.0)
    top = tl.max(tops, axis=0)
    safe_top = tl.where(top == float("-inf"), 0.0, top)  # a row without keys
    shrink = exp(tops - safe_top)
    norm = tl.sum(norms * shrink, axis=0)
    out = tl.sum(accs * shrink[:, None], axis=0)
    b, h, query = row // Tq // H, row // Tq % H, row % Tq
    none = without_keys(query, 0, 0, Tq, Tk, CAUSAL, False)
    total = divisor(norm, none)
    tl.store(lse_ptr + row, top + tl.log(total))
    out = out / total
    if HAS_DROPOUT:
        out *= tl.full((), keep_scale, ACC)
    out_ptr += b * out_strides[0] + h * out_strides[1] + query * out_strides[2]
    tl.store(out_ptr + column, narrow(out, out_ptr.dtype.element_ty), mask=column < DV)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: int | Tensor,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) as triton_impl.forward gives them, for at most FEW_QUERIES queries."""
    B, H, Tq, D = q.shape
    Hkv, Tk, DV = v.shape[1:]
    group, block_dv = H // Hkv, max(16, triton.next_power_of_2(DV))
    block_r, block_k, *pipeline = launch_config(
        max(D, DV), q.element_size(), group, dropout_p > 0.0
    )
    begin = first_key(Tq, Tk, window) // block_k * block_k
    most = parts_of(B, Hkv, Tk - begin)
    part_keys = triton.cdiv(triton.cdiv(Tk - begin, most), block_k) * block_k
    parts = triton.cdiv(Tk - begin, part_keys)
    strides = (Tq * H * DV, DV, H * DV, 1)
    out = torch.empty_strided((B, H, Tq, DV), strides, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=ACC[q.dtype], device=q.device)
    acc = torch.empty((parts, B, H, Tq, DV), dtype=lse.dtype, device=q.device)
    top, norm = torch.empty((2, parts, B, H, Tq), dtype=lse.dtype, device=q.device)
    threshold, keep_scale = dropout_arguments(dropout_p)
    launch(
        _attention_part_kernel,
        (parts * triton.cdiv(group * Tq, block_r) * B * Hkv,),
        q.device,
        acc,
        top,
        norm,
        q,
        k,
        v,
        *(t.stride()[:3] for t in (q, k, v)),
        lse.numel(),
        H,
        Tq,
        Tk,
        0 if window is None else min(window, Tk),
        parts,
        begin,
        part_keys,
        scale,
        *split_seed(seed if dropout_p else 0, q.device),
        threshold,
        GROUP=group,
        D=D,
        DV=DV,
        CAUSAL=causal,
        HAS_WINDOW=window is not None,
        HAS_DROPOUT=dropout_p > 0.0,
        NEGATIVE=scale < 0.0,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        BLOCK_DV=block_dv,
        **options(*pipeline),
    )
    launch(
        _attention_join_kernel,
        (B * H * Tq,),
        q.device,
        out,
        lse,
        acc,
        top,
        norm,
        out.stride()[:3],
        lse.numel(),
        H,
        Tq,
        Tk,
        parts,
        keep_scale,
        DV=DV,
        CAUSAL=causal,
        HAS_DROPOUT=dropout_p > 0.0,
        MOST=MOST_PARTS.value,
        BLOCK_DV=block_dv,
        num_warps=4 if block_dv * q.element_size() <= 256 else 8,
    )
    return out, lse
