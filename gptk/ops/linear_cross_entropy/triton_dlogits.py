"""The gradients of linear_cross_entropy's logits in 16 bits, some classes at a time: the logits are
formed again, and rounded once as their gradients, from the lse that forward left."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.linear_cross_entropy.triton_logits import Terms, logits_tile, operands, place
from gptk.ops.triton_launch import exp, launch, narrow


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
    first_row, first_column, tile_v = place(N, V, first_class, group, BLOCK_M, BLOCK_V)
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
    at_class = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    at = row.to(tl.int64)[:, None] * stride_dlogits + at_class[None, :]
    # to the end of the row in memory, whose stride is known to be a multiple of 16
    inside = (row < N)[:, None] & (at_class < stride_dlogits)[None, :]
    tl.store(dlogits_ptr + at, narrow(dz, dlogits_ptr.dtype.element_ty), mask=inside)
    if NEED_DBIAS:
        at = (first_row // BLOCK_M).to(tl.int64) * (V - first_class) + at_class
        tl.store(partial_ptr + at, tl.sum(dz, 0), mask=column < V)


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
    taken, group, flags, tile = operands(x, weight, bias is not None, "backward", terms)
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
        *taken,
        bias,
        target,
        dlogits.stride(0),
        N,
        classes.stop,
        C,
        classes.start,
        group,
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
