"""adamw by Triton: the norm of all gradients, and what follows from it for the update.

norm: squares are summed in float64, per block and then by one program in order: a tree fixed by the
shapes, no atomics. One launch for each dtype of the gradients, and one. factors: one launch.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.adamw.triton_tables import (
    COLUMNS,
    Scalar,
    addresses,
    aligned,
    find_row,
    launch_config,
    launches,
    send,
)
from gptk.ops.gelu.triton_impl import TL
from gptk.ops.triton_launch import ACC, launch, widen


@triton.jit(do_not_specialize=["tensors", "halvings"])
def _norm_partial_kernel(
    partial_ptr,  # (blocks,) float64
    table_ptr,  # (tensors, COLUMNS) int64
    tensors,
    halvings,
    GRAD: tl.constexpr,
    ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    row_ptr = find_row(table_ptr, block, tensors, halvings, COLUMNS)
    start = (block - tl.load(row_ptr)) * BLOCK
    at = start + tl.arange(0, BLOCK)
    n = tl.load(row_ptr + 1)
    grad = tl.load(row_ptr + 4)
    if (start + BLOCK <= n) & ((grad & 15) == 0):
        g = widen(tl.load(aligned(grad, GRAD) + at), ACC)
    else:
        g = widen(tl.load(grad.to(tl.pointer_type(GRAD)) + at, mask=at < n, other=0.0), ACC)
    wide = g.to(tl.float64)
    tl.store(partial_ptr + block, tl.sum(wide * wide, 0))


@triton.jit(do_not_specialize=["n"])
def _norm_kernel(
    norm_ptr,  # () float64
    partial_ptr,  # (n,) float64
    n,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + at, mask=at < n, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, 0)))


@triton.jit
def _factors_kernel(
    factors_ptr,  # (2,) float64: the unscaled norm, what to multiply gradients by
    skip_ptr,  # () bool
    norm_ptr,  # (), read with HAS_NORM
    scale_ptr,  # (), read with HAS_SCALE
    found_ptr,  # (), read with HAS_FOUND
    max_norm: tl.float64,
    HAS_NORM: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
):
    multiplier = tl.full((), 1.0, tl.float64)
    live = True
    if HAS_SCALE:
        multiplier = multiplier / widen(tl.load(scale_ptr), tl.float64)
    if HAS_FOUND:
        live = widen(tl.load(found_ptr), tl.float64) == 0.0
    if HAS_NORM:
        norm = widen(tl.load(norm_ptr), tl.float64)
        if SCALED:
            norm = norm * multiplier
        finite = tl.abs(norm) < float("inf")  # false for NaN too
        live = live & finite
        tl.store(factors_ptr, norm)
        clip = max_norm / (tl.where(finite, norm, 0.0) + 1e-6)  # of a skipped update: any number
        multiplier = tl.where(clip < 1.0, clip, 1.0) * multiplier
    tl.store(factors_ptr + 1, multiplier)
    tl.store(skip_ptr, live == 0)


def norm(grads: list[Tensor]) -> Tensor:
    """The L2 norm of all gradients together: 0-dim float64, never overflowing for float32 ones."""
    work = launches([g.dtype for g in grads], [g.numel() for g in grads], [addresses(grads)])
    if not work:
        return torch.zeros((), dtype=torch.float64, device=grads[0].device if grads else None)
    device = grads[0].device
    tables = send([each.table for each in work], device)
    partials = torch.empty(sum(each.blocks for each in work), dtype=torch.float64, device=device)
    parts = partials.split([each.blocks for each in work])
    for (dtype, rows, blocks), table, partial in zip(work, tables, parts, strict=True):
        launch(
            _norm_partial_kernel,
            (blocks,),
            device,
            partial,
            table,
            len(rows),
            (len(rows) - 1).bit_length(),
            GRAD=TL[dtype],
            ACC=TL[ACC[dtype]],
            COLUMNS=COLUMNS,
            **launch_config(),
        )
    out = torch.empty((), dtype=torch.float64, device=device)
    launch(_norm_kernel, (1,), device, out, partials, len(partials), BLOCK=1024)
    return out


def factors(
    norm: Tensor | None,
    scaled: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float | None,
) -> tuple[Tensor | None, Tensor | None, Scalar]:
    """(norm, skip, multiplier) as reference.factors gives them, in one launch."""
    given = next((x for x in (norm, grad_scale, found_inf) if x is not None), None)
    has_norm = norm is not None and max_grad_norm is not None
    if given is None or not (has_norm or grad_scale is not None or found_inf is not None):
        return norm, None, 1.0
    both = torch.empty(2, dtype=torch.float64, device=given.device)
    skip = torch.empty((), dtype=torch.bool, device=given.device)
    launch(
        _factors_kernel,
        (1,),
        given.device,
        both,
        skip,
        norm,
        grad_scale,
        found_inf,
        math.inf if max_grad_norm is None else float(max_grad_norm),
        HAS_NORM=has_norm,
        SCALED=scaled,
        HAS_SCALE=grad_scale is not None,
        HAS_FOUND=found_inf is not None,
    )
    clipped, multiplier = both.unbind()
    asked = has_norm or found_inf is not None
    return clipped if has_norm else norm, skip if asked else None, multiplier
