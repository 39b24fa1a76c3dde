"""linear: the matrix product with its epilogue (gptk/ops/cpp_epilogue.py)."""

import torch
from torch import Tensor

from gptk.ops.cpp_epilogue import (
    activate_backward,
    input_gradient,
    multiply,
    sum_rows,
    weight_gradient,
)
from gptk.ops.cpp_product import owns as rounds_float32

__all__ = ["backward", "forward", "rounds_float32", "unsupported"]


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """Every shape and every dtype of the catalog runs."""
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor | None]:
    """(y, pre) for x (M, K), weight (N, K); pre is None without activation."""
    return multiply(x, weight, bias, activation, keep_pre=activation is not None)


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
    dpre, dbias = dy, None
    if pre is not None:
        dpre, _, dbias = activate_backward(
            dy, pre, activation, x.dtype, bias_dtype if need_dbias else None, need_y=False
        )
    elif need_dbias:
        assert bias_dtype is not None
        dbias = sum_rows(dy, bias_dtype)
    dx = input_gradient(dpre, weight) if need_dx else None
    dweight = weight_gradient(dpre, x, weight_dtype) if need_dweight else None
    return dx, dweight, dbias
