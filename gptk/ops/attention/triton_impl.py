"""attention in Triton: softmax(q k^T scale) v by tiles, never storing the Tq x Tk matrix.

FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691): a program owns BLOCK_Q queries of
one head and runs over the keys with an online softmax. Tiles that no query of the program sees are
skipped, those that all see are not masked. Traffic: q and out once, k and v once for each tile of
queries. Grouped heads share k and v by indexing.
A few queries over many keys go to triton_decode, which splits the keys.

Tiles come by addresses (cp.async), not by tensor descriptors (TMA): compiled for sm_90, those put
no more warps on a processor than a limit of registers does (maxnreg in tuning.json), while the host
has to make them for each call, and rows must be a multiple of 16 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.attention import triton_decode
from gptk.ops.attention.ranges import Ranges
from gptk.ops.attention.triton_backward import backward
from gptk.ops.attention.triton_softmax import signed, softmax_step, unfolded
from gptk.ops.attention.triton_tiles import (
    divisor,
    edge,
    keys_of,
    kind_of,
    load_tile,
    mark_bad,
    masked_start,
    others_of,
    range_arguments,
    sees,
    store_tile,
    touched,
    within,
    without_keys,
)
from gptk.ops.philox_triton import philox_key
from gptk.ops.triton_launch import (
    ACC,
    architecture,
    dropout_arguments,
    launch,
    narrow,
    options,
    split_seed,
    why_not,
)
from gptk.ops.tuning import tuned

__all__ = ["backward", "forward", "launch_config", "unsupported"]


def launch_config(D: int, dtype: torch.dtype, kind: str, arch: int) -> tuple[int, ...]:
    """(BLOCK_Q, BLOCK_K, num_warps, num_stages, maxnreg) for the wider of the two head sizes."""
    return tuned("attention", "forward", arch, 8 * dtype.itemsize, D, kind)


@triton.jit(do_not_specialize=["H", "Tq", "Tk", "window", "seed_low", "seed_high"])
def _attention_forward_kernel(
    out_ptr,  # (B, H, Tq, DV)
    lse_ptr,  # (B, H, Tq) accumulator dtype, contiguous
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H // GROUP, Tk, D)
    v_ptr,  # (B, H // GROUP, Tk, DV)
    low_ptr,  # (Tq,): query i sees keys low[i] .. high[i] - 1; None: see CAUSAL, HAS_WINDOW
    high_ptr,
    out_strides,  # (b, h, t) of each: the last stride is 1
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
    GROUP: tl.constexpr,  # query heads for each key head
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    NEGATIVE: tl.constexpr,  # scale is
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
    head = (tl.program_id(0) // tiles).to(tl.int64)  # b * H + h
    b, h = head // H, head % H
    start_q = tile * BLOCK_Q
    query = start_q + tl.arange(0, BLOCK_Q)
    row = head * Tq + query  # of the dropout mask and of lse
    k_ptr += b * k_strides[0] + h // GROUP * k_strides[1]
    v_ptr += b * v_strides[0] + h // GROUP * v_strides[1]
    q_ptr += b * q_strides[0] + h * q_strides[1]
    q = load_tile(q_ptr, start_q, q_strides[2], Tq, D, BLOCK_Q, BLOCK_D, True)
    q, factor = signed(q, scale, NEGATIVE, ACC)
    key_low, key_high = 0, 0
    if HAS_DROPOUT:
        key_low, key_high = philox_key(seed_low, seed_high)

    acc = tl.zeros((BLOCK_Q, BLOCK_DV), ACC)
    norm = tl.zeros((BLOCK_Q,), ACC)
    top = tl.full((BLOCK_Q,), float("-inf"), ACC)
    low, high, bad = 0, 0, 0
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
        acc, norm, top, bad = softmax_step(
            acc, norm, top, bad, q, k_ptr, v_ptr, start, query, row, low, high, k_strides[2],
            v_strides[2], Tq, Tk, window, factor, key_low, key_high, threshold, D, DV, CAUSAL,
            HAS_WINDOW, HAS_RANGES, HAS_DROPOUT, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
    for index in tl.range(0, masked, num_stages=1):
        start = masked_start(index, first, left, full_end, EDGE)
        if not HAS_RANGES or touched(low, high, start, EDGE):
            acc, norm, top, bad = softmax_step(
                acc, norm, top, bad, q, k_ptr, v_ptr, start, query, row, low, high, k_strides[2],
                v_strides[2], Tq, Tk, window, factor, key_low, key_high, threshold, D, DV, CAUSAL,
                HAS_WINDOW, HAS_RANGES, HAS_DROPOUT, BLOCK_Q, EDGE, BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip

    if bad != 0:
        for index in tl.range(0, masked, num_stages=1):
            start = masked_start(index, first, left, full_end, EDGE)
            v = load_tile(v_ptr, start, v_strides[2], Tk, DV, EDGE, BLOCK_DV, True)
            key = start + tl.arange(0, EDGE)
            if HAS_RANGES:
                seen = within(low[:, None], high[:, None], key[None, :])
            else:
                seen = sees(query[:, None], key[None, :], Tq, Tk, window, CAUSAL, HAS_WINDOW)
            acc = mark_bad(acc, v, seen)

    none = without_keys(query, low, high, Tq, Tk, CAUSAL, HAS_RANGES)
    total = divisor(norm, none)
    top = unfolded(top, factor, q.dtype)
    tl.store(lse_ptr + row, top + tl.log(total), mask=query < Tq)
    out = acc / total[:, None]
    if HAS_DROPOUT:
        out *= tl.full((), keep_scale, ACC)
    out_ptr += b * out_strides[0] + h * out_strides[1]
    out = narrow(out, out_ptr.dtype.element_ty)
    store_tile(out_ptr, out, start_q, out_strides[2], Tq, DV, BLOCK_Q, BLOCK_DV)


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """None if these kernels run with head sizes `D` and `Dv` on this device, else the reason."""
    for name in ("D", "Dv"):
        size = traits.get(name, 1)
        if isinstance(size, int) and size > 256:
            return f"{name}={size} (a head has at most 256 columns)"
    return why_not(device_type)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: int | Tensor,
    window: int | None,
    ranges: Ranges | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, H, Tq, Dv), lse (B, H, Tq)) of q (B, H, Tq, D), k (B, Hkv, Tk, D), v; D <= 256.

    `ranges`, where given, say who sees whom in place of causal and window.
    """
    B, H, Tq, D = q.shape
    Hkv, Tk, DV = v.shape[1:]
    if scale == 0.0:  # 0 * -inf is not to be met in a kernel: scores of 0 by other means
        q, scale = q * 0.0, 1.0
    if ranges is None and triton_decode.pays(B, Hkv, Tq, Tk, window):
        return triton_decode.forward(q, k, v, causal, scale, dropout_p, seed, window)
    strides = (Tq * H * DV, DV, H * DV, 1)
    out = torch.empty_strided((B, H, Tq, DV), strides, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=ACC[q.dtype], device=q.device)
    block_q, block_k, *pipeline = launch_config(
        max(D, DV), q.dtype, kind_of(dropout_p, ranges), architecture(q.device)
    )
    launch(
        _attention_forward_kernel,
        (triton.cdiv(Tq, block_q) * B * H,),
        q.device,
        out,
        lse,
        q,
        k,
        v,
        *range_arguments(ranges, q.dtype)[:2],
        *(t.stride()[:3] for t in (out, q, k, v)),
        H,
        Tq,
        Tk,
        0 if window is None else min(window, Tk),
        scale,
        *split_seed(seed if dropout_p else 0, q.device),
        *dropout_arguments(dropout_p),
        GROUP=H // Hkv,
        D=D,
        DV=DV,
        CAUSAL=causal and ranges is None,
        HAS_WINDOW=window is not None and ranges is None,
        HAS_RANGES=ranges is not None,
        HAS_DROPOUT=dropout_p > 0.0,
        NEGATIVE=scale < 0.0,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        BLOCK_DV=max(16, triton.next_power_of_2(DV)),
        **options(*pipeline),
    )
    return out, lse
