"""The losses of linear_cross_entropy in 16 bits: of each row and tile of classes max z, sum exp(z -
max), sum(z - max) and z[target] are kept, and a second kernel joins the tiles of each row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.linear_cross_entropy.triton_logits import Terms, logits_tile, operands, place
from gptk.ops.triton_launch import exp, launch


@triton.jit(do_not_specialize=["N", "V", "group"])
def _logits_forward_kernel(
    top_ptr,  # (tiles of V, N) float32
    total_ptr,  # (tiles of V, N) float32
    spread_ptr,  # (tiles of V, N) float32, written with HAS_SMOOTHING
    z_target_ptr,  # (N,) float32, written where the target is a class
    x,
    w,
    bias_ptr,  # (V,), read with HAS_BIAS
    target_ptr,  # (N,) int64
    N,
    V,
    C,
    group,
    softcap: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    WHOLE_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_row, first_column, tile_v = place(N, V, 0, group, BLOCK_M, BLOCK_V)
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_V)
    z, _ = logits_tile(
        x, w, bias_ptr, row, column, N, V, C, softcap, HAS_BIAS, HAS_SOFTCAP, BY_DESCRIPTOR,
        WHOLE_C, BLOCK_M, BLOCK_V, BLOCK_C, first_row, first_column,
    )  # fmt: skip
    target = tl.load(target_ptr + row, mask=row < N, other=-1)
    here = (target >= first_column) & (target < tl.minimum(first_column + BLOCK_V, V))
    hit = column[None, :] == tl.where(here, target, -1).to(tl.int32)[:, None]
    tl.store(z_target_ptr + row, tl.sum(tl.where(hit, z, 0.0), 1), mask=here)

    inside = (column < V)[None, :]
    z = tl.where(inside, z, -float("inf"))
    top = tl.max(z, 1)
    shift = tl.where(top == -float("inf"), 0.0, top)[:, None]  # -inf - -inf would be NaN
    at = tile_v.to(tl.int64) * N + row
    tl.store(top_ptr + at, top, mask=row < N)
    tl.store(total_ptr + at, tl.sum(exp(z - shift), 1), mask=row < N)
    if HAS_SMOOTHING:
        spread = tl.sum(tl.where(inside, z - shift, 0.0), 1)
        tl.store(spread_ptr + at, spread, mask=row < N)


@triton.jit(do_not_specialize=["N", "V", "tiles", "ignore_index"])
def _loss_kernel(
    loss_ptr,  # (N,) float32
    lse_ptr,  # (N,) float32
    top_ptr,  # (tiles, N) float32, as the next two
    total_ptr,
    spread_ptr,  # read with HAS_SMOOTHING
    z_target_ptr,  # (N,) float32
    target_ptr,  # (N,) int64
    N,
    V,
    tiles,
    ignore_index,
    off_weight: tl.float64,  # s / V
    z_loss: tl.float64,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    TILE_V: tl.constexpr,  # classes of a tile
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + row, mask=row < N, other=-1)
    valid = (target >= 0) & (target < V)
    z_target = tl.load(z_target_ptr + row, mask=valid, other=float("nan"))
    pivot = tl.where(z_target == -float("inf"), 0.0, z_target)  # then the loss is inf anyway
    m = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    spread = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        at = tile.to(tl.int64)[:, None] * N + row[None, :]
        inside = (tile < tiles)[:, None] & (row < N)[None, :]
        top = tl.load(top_ptr + at, mask=inside, other=-float("inf"))
        grown = tl.maximum(m, tl.max(top, 0))
        shift = tl.where(grown == -float("inf"), 0.0, grown)
        part = tl.load(total_ptr + at, mask=inside, other=0.0) * exp(top - shift[None, :])
        total = total * exp(m - shift) + tl.sum(part, 0)
        if HAS_SMOOTHING:
            classes = tl.minimum(V - tile * TILE_V, TILE_V).to(tl.float32)
            above = tl.where(top == -float("inf"), 0.0, top) - pivot[None, :]
            part = tl.load(spread_ptr + at, mask=inside, other=0.0) + classes[:, None] * above
            spread += tl.sum(tl.where(inside, part, 0.0), 0)
        m = grown
    log_total = tl.log(tl.where(row < N, total, 1.0))
    lse = m + log_total
    loss = log_total + (m - z_target)
    if HAS_SMOOTHING:
        loss -= tl.full((), off_weight, tl.float64).to(tl.float32) * spread
    if HAS_Z_LOSS:
        loss += tl.full((), z_loss, tl.float64).to(tl.float32) * lse * lse
    tl.store(loss_ptr + row, tl.where(target == ignore_index, 0.0, loss), mask=row < N)
    tl.store(lse_ptr + row, lse, mask=row < N)


def losses(
    loss: Tensor,
    lse: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    terms: Terms,
) -> None:
    """Write loss and lse (N,) float32 for x (N, C), weight (V, C), both in_sixteens, bias (V,),
    target (N,)."""
    (N, C), V = x.shape, weight.shape[0]
    taken, group, flags, tile = operands(x, weight, bias is not None, "forward", terms)
    tiles = triton.cdiv(V, tile["BLOCK_V"])
    smoothed = terms.label_smoothing != 0.0
    partial = x.new_empty((3 if smoothed else 2, tiles, N), dtype=torch.float32)
    top, total = partial[0], partial[1]
    spread = partial[2] if smoothed else None
    z_target = torch.empty_like(loss)
    launch(
        _logits_forward_kernel,
        (triton.cdiv(N, tile["BLOCK_M"]) * tiles,),
        x.device,
        top,
        total,
        spread,
        z_target,
        *taken,
        bias,
        target,
        N,
        V,
        C,
        group,
        float(terms.softcap or 0.0),
        HAS_BIAS=bias is not None,
        HAS_SMOOTHING=smoothed,
        HAS_SOFTCAP=terms.softcap is not None,
        **flags,
        **tile,
    )
    launch(
        _loss_kernel,
        (triton.cdiv(N, 32),),
        x.device,
        loss,
        lse,
        top,
        total,
        spread,
        z_target,
        target,
        N,
        V,
        tiles,
        terms.ignore_index,
        terms.label_smoothing / V,
        float(terms.z_loss),
        HAS_SMOOTHING=smoothed,
        HAS_Z_LOSS=terms.z_loss != 0.0,
        TILE_V=tile["BLOCK_V"],
        BLOCK_T=16,
        BLOCK_N=32,
        num_warps=4,
    )
