"""Tiles of logits = x W^T + b that never leave the chip: the product of 16-bit operands, then what
linear_cross_entropy wants of a tile while it is still in registers.

    forward   per row and tile of the vocabulary: max z, sum exp(z - max), sum (z - max), z[target]
    backward  dlogits of a tile, rounded once, from the lse that forward left

A program owns BLOCK_M rows and BLOCK_V classes and runs over C; programs that follow each other
share classes and, in groups of `group` tiles, rows, so that both operands come from the L2 cache.
Operands have rows of a multiple of 16 bytes (`in_sixteens`). From compute capability 9.0 on they
come by tensor descriptors (TMA): no addresses and no masks are computed in the loop.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gptk.ops.cross_entropy.triton_impl import capped
from gptk.ops.triton_launch import architecture, dot, exp, launch, narrow, widen
from gptk.ops.tuning import tuned


class Terms(NamedTuple):
    """What the loss is, beside the targets: as in cross_entropy."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float


def launch_config(pass_: str, arch: int, has_softcap: bool) -> tuple[int, ...]:
    """(BLOCK_M, BLOCK_V, BLOCK_C, num_warps, num_stages) of the forward or the backward pass."""
    kind = "softcap" if has_softcap else "plain"
    return tuned("linear_cross_entropy", pass_, arch, 16, 0, kind)


@triton.jit
def logits_tile(
    x,  # (N, C): a pointer, or a descriptor of (BLOCK_M, BLOCK_C)
    w,  # (V, C): a pointer, or a descriptor of (BLOCK_V, BLOCK_C)
    bias_ptr,
    row,  # (BLOCK_M,)
    column,  # (BLOCK_V,)
    N,
    V,
    C,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    WHOLE_C: tl.constexpr,  # BLOCK_C divides C
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    first_row,
    first_column,
):
    """(z, dz / dlogits), z with bias and softcap; what is past N or V is some number."""
    z = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if BY_DESCRIPTOR:
        for start in range(0, C, BLOCK_C):
            a = x.load([first_row, start])
            b = w.load([first_column, start])
            z = dot(a, b.T, z)
    else:
        part = tl.arange(0, BLOCK_C)
        # past the end: the last row once more, so no mask
        a_ptr = x + tl.minimum(row, N - 1).to(tl.int64)[:, None] * C + part[None, :]
        b_ptr = w + tl.minimum(column, V - 1).to(tl.int64)[None, :] * C + part[:, None]
        for start in range(0, C, BLOCK_C):
            if WHOLE_C:
                a = tl.load(a_ptr)
                b = tl.load(b_ptr)
            else:
                a = tl.load(a_ptr, mask=(part < C - start)[None, :], other=0.0)
                b = tl.load(b_ptr, mask=(part < C - start)[:, None], other=0.0)
            z = dot(a, b, z)
            a_ptr += BLOCK_C
            b_ptr += BLOCK_C
    if HAS_BIAS:
        bias = widen(tl.load(bias_ptr + column, mask=column < V, other=0.0), tl.float32)
        z += bias[None, :]
    slope = 1.0
    if HAS_SOFTCAP:
        z, slope = capped(z, softcap, tl.float32)
    return z, slope


@triton.jit
def _place(N, V, first_class, group, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """(first row, first class, tile of classes) of this program: `group` tiles of rows, then the
    next classes."""
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_v = tl.cdiv(V - first_class, BLOCK_V)
    program = tl.program_id(0)
    first_tile = program // (group * tiles_v) * group
    rows = tl.minimum(tiles_m - first_tile, group)
    within = program % (group * tiles_v)
    tile_m = first_tile + within % rows
    tile_v = within // rows
    return tile_m * BLOCK_M, first_class + tile_v * BLOCK_V, tile_v


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
    first_row, first_column, tile_v = _place(N, V, 0, group, BLOCK_M, BLOCK_V)
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


@triton.jit(do_not_specialize=["N", "V", "first_class", "group", "ignore_index"])
def _logits_backward_kernel(
    dlogits_ptr,  # (N, stride_dlogits) 16 bits
    partial_ptr,  # (tiles of N, V - first_class) float32, written with NEED_DBIAS
    dloss_ptr,  # (N,) float32
    lse_ptr,  # (N,) float32
    x,
    w,
    bias_ptr,  # (V,), read with HAS_BIAS
    target_ptr,  # (N,) int64
    stride_dlogits,
    N,
    V,  # the end of the classes that are wanted
    C,
    first_class,
    group,
    ignore_index,
    classes,  # of the whole vocabulary
    on_weight: tl.float64,  # 1 - s
    off_weight: tl.float64,  # s / V
    softcap: tl.float64,
    z_loss: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    WHOLE_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_row, first_column, tile_v = _place(N, V, first_class, group, BLOCK_M, BLOCK_V)
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_V)
    z, slope = logits_tile(
        x, w, bias_ptr, row, column, N, V, C, softcap, HAS_BIAS, HAS_SOFTCAP, BY_DESCRIPTOR,
        WHOLE_C, BLOCK_M, BLOCK_V, BLOCK_C, first_row, first_column,
    )  # fmt: skip
    target = tl.load(target_ptr + row, mask=row < N, other=-1)
    lse = tl.load(lse_ptr + row, mask=row < N, other=0.0)
    dloss = tl.load(dloss_ptr + row, mask=row < N, other=0.0)
    valid = (target >= 0) & (target < classes)
    dloss = tl.where(valid, dloss, float("nan"))
    own_class = tl.where(valid, target, -1).to(tl.int32)
    on = tl.full((), on_weight, tl.float64).to(tl.float32)
    off = tl.full((), off_weight, tl.float64).to(tl.float32)
    p = exp(z - lse[:, None])
    dz = (p - tl.where(column[None, :] == own_class[:, None], on, 0.0)) - off
    if HAS_Z_LOSS:  # d (z_loss lse^2) / d lse
        dz += (2.0 * tl.full((), z_loss, tl.float64).to(tl.float32) * lse)[:, None] * p
    if HAS_SOFTCAP:
        dz *= slope
    counts = (row < N) & (target != ignore_index)
    dz = tl.where(counts[:, None], dloss[:, None] * dz, 0.0)
    place = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    at = row.to(tl.int64)[:, None] * stride_dlogits + place[None, :]
    # to the end of the row in memory, whose stride is known to be a multiple of 16
    inside = (row < N)[:, None] & (place < stride_dlogits)[None, :]
    tl.store(dlogits_ptr + at, narrow(dz, dlogits_ptr.dtype.element_ty), mask=inside)
    if NEED_DBIAS:
        at = (first_row // BLOCK_M).to(tl.int64) * (V - first_class) + place
        tl.store(partial_ptr + at, tl.sum(dz, 0), mask=column < V)


def in_sixteens(matrix: Tensor) -> Tensor:
    """The matrix, or a copy with zeros to the right, whose rows all begin at multiples of 16 bytes:
    what wide loads and descriptors need."""
    rows, columns = matrix.shape
    step = 16 // matrix.element_size()
    if columns % step == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    copy = matrix.new_zeros((rows, triton.cdiv(columns, step) * step))
    copy[:, :columns] = matrix
    return copy


def _operands(
    x: Tensor, weight: Tensor, pass_: str, terms: Terms
) -> tuple[tuple[Any, Any], dict[str, Any], dict[str, int]]:
    """((x, weight) as the kernel takes them, its flags, its tile)."""
    C = x.shape[1]
    arch = architecture(x.device)
    by_descriptor = arch >= 90
    block_m, block_v, block_c, warps, stages = launch_config(pass_, arch, terms.softcap is not None)
    operands: tuple[Any, Any] = (x, weight)
    if by_descriptor:
        operands = (
            TensorDescriptor(x, list(x.shape), [C, 1], [block_m, block_c]),
            TensorDescriptor(weight, list(weight.shape), [C, 1], [block_v, block_c]),
        )
    flags = {"BY_DESCRIPTOR": by_descriptor, "WHOLE_C": C % block_c == 0}
    tile = {"BLOCK_M": block_m, "BLOCK_V": block_v, "BLOCK_C": block_c}
    return operands, flags, {**tile, "num_warps": warps, "num_stages": stages}


def _group(N: int, C: int, block_m: int) -> int:
    """Tiles of rows that programs run through before the next classes: 8 MiB of x, say."""
    return max(1, min((4 << 20) // (C * block_m), triton.cdiv(N, block_m)))


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
    operands, flags, tile = _operands(x, weight, "forward", terms)
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
        *operands,
        bias,
        target,
        N,
        V,
        C,
        _group(N, C, tile["BLOCK_M"]),
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


def logit_gradients(
    dlogits: Tensor,
    dloss: Tensor,
    lse: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    classes: slice,
    terms: Terms,
    need_dbias: bool,
) -> Tensor | None:
    """Write the gradients of the classes' logits in x's dtype to the first columns of dlogits
    (N, at least these), contiguous; return the sums over tiles of rows of what is not rounded yet,
    (tiles, classes) float32, if need_dbias.

    x and weight are in_sixteens. Columns of dlogits past the classes get numbers without meaning.
    """
    (N, C), V = x.shape, weight.shape[0]
    operands, flags, tile = _operands(x, weight, "backward", terms)
    width = classes.stop - classes.start
    tiles_m = triton.cdiv(N, tile["BLOCK_M"])
    partial = x.new_empty((tiles_m, width), dtype=torch.float32) if need_dbias else None
    launch(
        _logits_backward_kernel,
        (tiles_m * triton.cdiv(width, tile["BLOCK_V"]),),
        x.device,
        dlogits,
        partial,
        dloss,
        lse,
        *operands,
        bias,
        target,
        dlogits.stride(0),
        N,
        classes.stop,
        C,
        classes.start,
        _group(N, C, tile["BLOCK_M"]),
        terms.ignore_index,
        V,
        1.0 - terms.label_smoothing,
        terms.label_smoothing / V,
        float(terms.softcap or 0.0),
        float(terms.z_loss),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=terms.softcap is not None,
        HAS_Z_LOSS=terms.z_loss != 0.0,
        NEED_DBIAS=need_dbias,
        **flags,
        **tile,
    )
    return partial
