"""Tiles of logits = x W^T + b that never leave the chip: the product of 16-bit operands, which
triton_losses and triton_dlogits work on while it is in registers.

A program owns BLOCK_M rows and BLOCK_V classes and runs over C; programs that follow each other
share classes and, in groups of `group` tiles, rows, so that both operands come from the L2 cache.
Operands have rows of a multiple of 16 bytes (`in_sixteens`). From compute capability 9.0 on they
come by tensor descriptors (TMA): no addresses and no masks are computed in the loop.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gptk.ops.cross_entropy.triton_impl import capped
from gptk.ops.triton_launch import architecture, dot, options, widen
from gptk.ops.tuning import tuned


class Terms(NamedTuple):
    """What the loss is, beside the targets: as in cross_entropy."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float


def launch_config(pass_: str, arch: int, kind: str) -> tuple[int, ...]:
    """(BLOCK_M, BLOCK_V, BLOCK_C, num_warps, num_stages, maxnreg) of a pass."""
    return tuned("linear_cross_entropy", pass_, arch, 16, 0, kind)


def kind_of(C: int, has_bias: bool, terms: Terms) -> str:
    """Which rows of tuning.json are for a call: what is done to a tile takes registers, and so do
    the masks of a C that tiles do not divide."""
    if terms.softcap is not None:
        return "softcap"
    return "extras" if has_bias or terms.label_smoothing or C % 64 else "plain"


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
def place(N, V, first_class, group, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
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


def operands(
    x: Tensor, weight: Tensor, has_bias: bool, pass_: str, terms: Terms
) -> tuple[tuple[Any, Any], int, dict[str, Any], dict[str, int]]:
    """((x, weight) as the kernel takes them, how many tiles of rows are a group, flags, tile)."""
    C = x.shape[1]
    arch = architecture(x.device)
    by_descriptor = arch >= 90
    kind = kind_of(C, has_bias, terms)
    block_m, block_v, block_c, *pipeline = launch_config(pass_, arch, kind)
    taken: tuple[Any, Any] = (x, weight)
    if by_descriptor:
        taken = (
            TensorDescriptor(x, list(x.shape), [C, 1], [block_m, block_c]),
            TensorDescriptor(weight, list(weight.shape), [C, 1], [block_v, block_c]),
        )
    flags = {"BY_DESCRIPTOR": by_descriptor, "WHOLE_C": C % block_c == 0}
    tile = {"BLOCK_M": block_m, "BLOCK_V": block_v, "BLOCK_C": block_c}
    together = _group(x.shape[0], C, block_m)
    return taken, together, flags, {**tile, **options(*pipeline)}


def _group(N: int, C: int, block_m: int) -> int:
    """Tiles of rows that programs run through before the next classes: 8 MiB of x, say."""
    return max(1, min((4 << 20) // (C * block_m), triton.cdiv(N, block_m)))
