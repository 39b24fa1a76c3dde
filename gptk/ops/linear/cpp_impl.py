"""linear: torch's matrix product with the C++ extension's epilogues (csrc/cpu/gelu.cpp)."""

import torch
from torch import Tensor
from torch.nn.functional import linear as product

from gptk.ops.cpp_epilogue import (
    activate,
    activate_backward,
    product_dtype,
    sum_rows,
    weight_gradient,
)


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """Every shape and every dtype of the catalog runs."""
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor | None]:
    """(y, pre) for x (M, K), weight (N, K); pre is None without activation."""
    dtype = x.dtype
    wide = product_dtype(dtype)
    if activation is None and wide == dtype:
        return product(x, weight, bias), None
    acc = product(x.to(wide), weight.to(wide))
    return activate(acc, bias, activation, dtype, keep_pre=activation is not None)


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
    """(dx, dweight, dbias)."""
    need_dx, need_dweight, need_dbias = needs
    wide = product_dtype(x.dtype)
    dbias = None
    if pre is None:
        dpre = dy
        if need_dbias:
            assert bias_dtype is not None
            dbias = sum_rows(dy, bias_dtype)
    else:
        dpre, _, dbias = activate_backward(
            dy, pre, activation, wide, bias_dtype if need_dbias else None, need_y=False
        )
    if need_dx or need_dweight:
        dpre = dpre.to(wide)
    dx = torch.mm(dpre, weight.to(wide)).to(x.dtype) if need_dx else None
    dweight = weight_gradient(dpre, x, weight_dtype) if need_dweight else None
    return dx, dweight, dbias
