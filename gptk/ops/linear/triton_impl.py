"""linear by Triton: y = act(x W^T + b), with cuBLAS products and our epilogues.

The products are torch.mm / torch.addmm: cuBLAS is the right GEMM, and its own epilogue adds the
bias in float32 before the one rounding, which a kernel behind a rounded product could not. Ours are

    forward   the activation, one pass: reads pre, writes y
    backward  one pass: dpre = dy act'(pre), the column sums of dpre (the bias gradient) and, for
              `mlp`, act(pre) again; without an activation, only the column sums

Column sums are a fixed tree: each program adds ROWS rows, a second kernel adds those partial rows.
The split depends on the shape alone and there are no atomics, so the same inputs give the same
bits. The sums use dpre before it is rounded. Whether float32 products may use TF32 is torch's
setting (torch.set_float32_matmul_precision), as for torch.nn.functional.linear.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.gelu.triton_impl import TL, activate, gelu, gelu_slope
from gptk.ops.gelu.triton_impl import unsupported as unsupported
from gptk.ops.triton_launch import ACC, architecture, launch, narrow, widen
from gptk.ops.tuning import user_row

ROWS = 64
"""Rows that one program of the first stage adds."""


def launch_config(N: int) -> dict[str, int]:
    """Tile of the row-summing kernels; N is the number of columns."""
    block_n = min(128, max(16, triton.next_power_of_2(N)))
    return {"BLOCK_M": 1024 // block_n, "BLOCK_N": block_n, "num_warps": 4}


def _config(dy: Tensor, activation: str | None) -> dict[str, int]:
    """The user's configuration, or the one that ships."""
    N, bits = dy.shape[1], 8 * dy.element_size()
    own = user_row("linear.epilogue", architecture(dy.device), bits, N, activation or "none")
    if own is None:
        return launch_config(N)
    return {"BLOCK_M": own[0], "BLOCK_N": own[1], "num_warps": own[2]}


@triton.jit(do_not_specialize=["M"])
def _activation_backward_kernel(
    dpre_ptr,  # (M, N), written with HAS_ACTIVATION
    y_ptr,  # (M, N) act(pre), written with HAS_Y
    partial_ptr,  # (cdiv(M, ROWS), N) accumulation dtype, written with HAS_SUM
    dy_ptr,  # (M, N)
    pre_ptr,  # (M, N), read with HAS_ACTIVATION
    M,
    N,
    ACTIVATION: tl.constexpr,
    HAS_ACTIVATION: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_SUM: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(0, ROWS, BLOCK_M):
        rows = group * ROWS + first + tl.arange(0, BLOCK_M)
        at = rows[:, None] * N + columns[None, :]
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        dpre = widen(tl.load(dy_ptr + at, mask=inside, other=0.0), ACC)
        if HAS_ACTIVATION:
            pre = widen(tl.load(pre_ptr + at, mask=inside, other=0.0), ACC)
            dpre = dpre * gelu_slope(pre, ACTIVATION)
            tl.store(dpre_ptr + at, narrow(dpre, dpre_ptr.dtype.element_ty), mask=inside)
            if HAS_Y:
                y = gelu(pre, ACTIVATION)
                tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=inside)
        if HAS_SUM:
            total += dpre
    if HAS_SUM:
        tl.store(partial_ptr + group * N + columns, tl.sum(total, 0), mask=columns < N)


@triton.jit(do_not_specialize=["groups"])
def _sum_partials_kernel(
    out_ptr,  # (N,)
    partial_ptr,  # (groups, N) accumulation dtype
    groups,
    N,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(0, groups, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M).to(tl.int64)
        at = rows[:, None] * N + columns[None, :]
        inside = (rows < groups)[:, None] & (columns < N)[None, :]
        total += tl.load(partial_ptr + at, mask=inside, other=0.0)
    summed = narrow(tl.sum(total, 0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + columns, summed, mask=columns < N)


def product(a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a @ b (+ bias) in `dtype`, summed in float32 (float64 for float64) and rounded once."""
    acc = ACC[a.dtype]
    if a.device.type == "cpu":  # the interpreter: torch's CPU products have no out_dtype
        a, b = a.to(acc), b.to(acc)
        bias = None if bias is None else bias.to(acc)
    elif a.dtype != acc and dtype != a.dtype:
        if bias is None:
            return torch.mm(a, b, out_dtype=torch.float32).to(dtype)
        return torch.addmm(bias.to(acc), a, b, out_dtype=torch.float32).to(dtype)
    c = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    return c.to(dtype)


def activation_backward(
    dy: Tensor,
    pre: Tensor | None,
    activation: str | None,
    sum_dtype: torch.dtype | None,
    need_y: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dpre, act(pre) if need_y, column sums of dpre in sum_dtype if given), dy and pre (M, N).

    Without an activation dpre is dy itself, and act(pre) is pre.
    """
    M, N = dy.shape
    config = _config(dy, activation)
    acc = ACC[dy.dtype]
    groups = triton.cdiv(M, ROWS)
    dpre = dy if activation is None else torch.empty_like(dy)
    y = None if not need_y else pre if activation is None else torch.empty_like(dy)
    partial = None if sum_dtype is None else dy.new_empty((groups, N), dtype=acc)
    if activation is None and partial is None:
        return dy, y, None
    columns = triton.cdiv(N, config["BLOCK_N"])
    launch(
        _activation_backward_kernel,
        (groups, columns),
        dy.device,
        dpre,
        y,
        partial,
        dy,
        pre,
        M,
        N,
        ACTIVATION=activation,
        HAS_ACTIVATION=activation is not None,
        HAS_Y=need_y and activation is not None,
        HAS_SUM=partial is not None,
        ACC=TL[acc],
        ROWS=ROWS,
        **config,
    )
    if partial is None:
        return dpre, y, None
    out = dy.new_empty((N,), dtype=sum_dtype)
    sum_partials(out, partial)
    return dpre, y, out


def sum_partials(out: Tensor, partial: Tensor) -> None:
    """Write the sum over the rows of a contiguous partial (groups, N) to out (N,)."""
    groups, N = partial.shape
    config = launch_config(N)
    launch(
        _sum_partials_kernel,
        (triton.cdiv(N, config["BLOCK_N"]),),
        partial.device,
        out,
        partial,
        groups,
        N,
        ACC=TL[partial.dtype],
        **config,
    )


def column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the rows of a contiguous x (M, N), rounded once to `dtype`."""
    total = activation_backward(x, None, None, dtype)[2]
    assert total is not None
    return total


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor | None]:
    """(y, pre) for x (M, K), weight (N, K), bias (N,); pre is None without an activation."""
    pre = product(x, weight.t(), x.dtype, bias)
    return activate(pre, activation), None if activation is None else pre


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor | None,
    activation: str | None,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) of y (M, N); needs names those wanted, the others are None."""
    need_dx, need_dweight, need_dbias = needs
    dpre, dbias = dy, None
    if any(needs):
        dpre, _, dbias = activation_backward(
            dy, pre, activation, bias_dtype if need_dbias else None
        )
    dx = product(dpre, weight, x.dtype) if need_dx else None
    dweight = product(dpre.t(), x, weight_dtype) if need_dweight else None
    return dx, dweight, dbias
