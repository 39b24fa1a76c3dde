"""What the C++ backends of linear, mlp and linear_cross_entropy share: torch's matrix product, the
extension's epilogues (bias + activation, its backward, sums over rows), and the dtypes in between.

A product of 16-bit matrices runs in that dtype only where oneDNN has kernels for it on this CPU.
Elsewhere torch would loop over elements (measured on AVX2: 60 times slower than converting to
float32 first), so the operands are widened and the epilogue rounds once.
"""

import functools

import torch
from torch import Tensor

from gptk.native import ACC, ACTIVATION, DTYPE, load, row_groups, threads


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU should multiply matrices of `dtype`."""
    if torch.backends.mkldnn.is_available():
        if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return dtype
        if dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return dtype
    return ACC[dtype]


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x (N, K) in `dtype`, summed in float32 at least and rounded at most once."""
    wide = torch.promote_types(dtype, product_dtype(x.dtype))
    return torch.mm(dy.to(wide).t(), x.to(wide)).to(dtype)


def activate(
    product: Tensor, bias: Tensor | None, activation: str | None, dtype: torch.dtype, keep_pre: bool
) -> tuple[Tensor, Tensor | None]:
    """y = activation(product + bias) in `dtype`, and the pre-activation if it is to be kept.

    `product` is the caller's own temporary: the pre-activation may be formed in its memory.
    """
    M, N = product.shape
    pre = None
    if keep_pre:
        pre = product if product.dtype == dtype else torch.empty((M, N), dtype=dtype)
    y = torch.empty((M, N), dtype=dtype)
    load().activation_forward(
        y.data_ptr(),
        0 if pre is None else pre.data_ptr(),
        product.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        M,
        N,
        ACTIVATION[activation],
        DTYPE[dtype],
        DTYPE[product.dtype],
        0 if bias is None else DTYPE[bias.dtype],
        threads(),
    )
    return y, pre


def activate_backward(
    dy: Tensor,
    pre: Tensor,
    activation: str | None,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    need_y: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dpre, y, dbias): dpre and y = activation(pre) in `dtype`, dbias None if bias_dtype is."""
    M, N = dy.shape
    groups = row_groups(M)
    dpre = torch.empty((M, N), dtype=dtype)
    y = torch.empty((M, N), dtype=dtype) if need_y else None
    dbias = partial = None
    if bias_dtype is not None:
        dbias = torch.empty(N, dtype=bias_dtype)
        partial = torch.empty((groups, N), dtype=ACC[dy.dtype])
    load().activation_backward(
        dpre.data_ptr(),
        0 if y is None else y.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        dy.data_ptr(),
        pre.data_ptr(),
        M,
        N,
        groups,
        ACTIVATION[activation],
        DTYPE[dtype],
        0 if bias_dtype is None else DTYPE[bias_dtype],
        DTYPE[dy.dtype],
        DTYPE[pre.dtype],
        threads(),
    )
    return dpre, y, dbias


def sum_rows(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of dy (M, N) over its rows, (N,), in the accumulation dtype, rounded once."""
    M, N = dy.shape
    groups = row_groups(M)
    total = torch.empty(N, dtype=dtype)
    partial = torch.empty((groups, N), dtype=ACC[dy.dtype])
    load().activation_backward(
        0,  # dpre
        0,  # y
        total.data_ptr(),
        partial.data_ptr(),
        dy.data_ptr(),
        0,  # pre
        M,
        N,
        groups,
        ACTIVATION[None],
        0,
        DTYPE[dtype],
        DTYPE[dy.dtype],
        0,
        threads(),
    )
    return total
