"""layer_norm by the C++ extension (csrc/cpu/layer_norm.cpp): addresses and sizes, nothing else."""

import torch
from torch import Tensor

from gptk.native import ACC, DTYPE, MASK64, alive, empty, load, row_groups, threads, workspace


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """Every shape and every dtype of the catalog runs."""
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    seed: int | Tensor,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, h, mean, rstd) for x (M, N); h is None without residual; y_dtype: default h's."""
    M, N = x.shape
    dtype = x.dtype
    h = None
    if residual is not None:
        if residual.dtype != dtype:
            dtype = torch.promote_types(dtype, residual.dtype)
        h = empty((M, N), dtype)
    y = empty((M, N), y_dtype or dtype)
    mean = empty(M, ACC[dtype])
    rstd = empty(M, ACC[dtype])
    load().layer_norm_forward(
        y.data_ptr(),
        0 if h is None else h.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        M,
        N,
        eps,
        dropout_p,
        int(seed) & MASK64 if dropout_p else 0,
        DTYPE[y.dtype],
        DTYPE[x.dtype],
        0 if residual is None else DTYPE[residual.dtype],
        DTYPE[dtype],
        0 if weight is None else DTYPE[weight.dtype],
        0 if bias is None else DTYPE[bias.dtype],
        threads(),
    )
    alive(x, residual, weight, bias)
    return y, h, mean, rstd


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    dropout_p: float,
    seed: int | Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias); dx and dresidual are one tensor where their values are."""
    M, N = h.shape
    need_dx, need_dresidual, need_dweight, need_dbias = needs
    weight_dtype = h.dtype if weight is None else weight.dtype
    groups = row_groups(M)
    dresidual = None
    if need_dresidual:
        assert residual_dtype is not None
        dresidual = empty((M, N), residual_dtype)
    same = dresidual is not None and dropout_p == 0 and x_dtype == residual_dtype
    dx = empty((M, N), x_dtype) if need_dx and not same else None
    dweight = empty(N, weight_dtype) if need_dweight else None
    dbias = empty(N, weight_dtype) if need_dbias else None
    partial = None
    if need_dweight or need_dbias:
        partial = workspace("sums over rows", 2 * groups * N, ACC[h.dtype])
    load().layer_norm_backward(
        0 if dx is None else dx.data_ptr(),
        0 if dresidual is None else dresidual.data_ptr(),
        0 if dweight is None else dweight.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        dy.data_ptr(),
        0 if dh is None else dh.data_ptr(),
        h.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        M,
        N,
        groups,
        dropout_p,
        int(seed) & MASK64 if dropout_p else 0,
        DTYPE[x_dtype],
        0 if residual_dtype is None else DTYPE[residual_dtype],
        DTYPE[dy.dtype],
        DTYPE[h.dtype],
        DTYPE[weight_dtype],
        threads(),
    )
    alive(dy, dh, h, weight, mean, rstd, partial)
    return (dresidual if need_dx and same else dx), dresidual, dweight, dbias
