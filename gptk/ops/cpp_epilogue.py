"""What the C++ backends of linear, mlp and linear_cross_entropy share: the matrix product with its
epilogue (the extension's own, see cpp_product.py, or torch's and then the extension's passes over
the result), and the sums over rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from gptk.native import ACC, ACTIVATION, DTYPE, alive, empty, load, row_groups, threads, workspace
from gptk.ops.cpp_product import FEW_ROWS, owns, product, product_dtype


def own(dtype: torch.dtype, rows: int) -> bool:
    """Are all products with `rows` rows of this dtype the extension's, the gradients', too?"""
    return owns(dtype) and (rows > FEW_ROWS or dtype.itemsize == 2)


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_pre: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, pre): y = activation(pre) (M, N) in x's dtype, pre = x weight^T + bias if it is kept."""
    dtype = x.dtype
    if owns(dtype):
        return product(x, weight.t(), bias, activation, keep_pre=keep_pre)
    wide = product_dtype(dtype)
    x, weight = x.to(wide), weight.to(dtype).to(wide)
    if activation is None and wide == dtype:
        y = linear(x, weight, None if bias is None else bias.to(dtype))
        return y, y if keep_pre else None
    return activate(linear(x, weight), bias, activation, dtype, keep_pre)


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dy weight (M, K) in dy's dtype."""
    dtype = dy.dtype
    if own(dtype, dy.shape[0]):
        return product(dy, weight)[0]
    wide = product_dtype(dtype)
    return torch.mm(dy.to(wide), weight.to(dtype).to(wide)).to(dtype)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x (N, K) in `dtype`, summed in float32 at least and rounded at most once."""
    if owns(x.dtype) and dtype in (x.dtype, torch.float32):
        return product(dy.t(), x, out=dtype)[0]
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
        pre = product if product.dtype == dtype else empty((M, N), dtype)
    y = empty((M, N), dtype)
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
    alive(product, bias)
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
    dpre = empty((M, N), dtype)
    y = empty((M, N), dtype) if need_y else None
    dbias = partial = None
    if bias_dtype is not None:
        dbias = empty(N, bias_dtype)
        partial = workspace("sums over rows", groups * N, ACC[dy.dtype])
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
    alive(dy, pre, partial)
    return dpre, y, dbias


def sum_rows(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of dy (M, N) over its rows, (N,), in the accumulation dtype, rounded once."""
    M, N = dy.shape
    groups = row_groups(M)
    total = empty(N, dtype)
    partial = workspace("sums over rows", groups * N, ACC[dy.dtype])
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
    alive(dy, partial)
    return total
