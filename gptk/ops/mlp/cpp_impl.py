"""mlp: two matrix products with their epilogues (gptk/ops/cpp_epilogue.py).

The activation is not stored: backward computes it from `pre` again, where the activation's slope is
needed anyway (in the epilogue of dy w2, where that product is the extension's).
"""

import torch
from torch import Tensor

from gptk.ops.cpp_epilogue import (
    activate,
    activate_backward,
    input_gradient,
    multiply,
    own,
    sum_rows,
    weight_gradient,
)
from gptk.ops.cpp_product import owns as rounds_float32
from gptk.ops.cpp_product import product

__all__ = ["backward", "forward", "rounds_float32", "unsupported"]


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """Every shape and every dtype of the catalog runs."""
    return None


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(y, pre) for x (M, C), w1 (hidden, C), w2 (C_out, hidden)."""
    hidden, pre = multiply(x, w1, b1, activation, keep_pre=True)
    assert pre is not None
    return multiply(hidden, w2, b2, None, keep_pre=False)[0], pre


def backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    w1: Tensor,
    w2: Tensor,
    activation: str,
    dtypes: tuple[torch.dtype, torch.dtype | None, torch.dtype, torch.dtype | None],
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw1, db1, dw2, db2)."""
    w1_dtype, b1_dtype, w2_dtype, b2_dtype = dtypes
    need_dx, need_dw1, need_db1, need_dw2, need_db2 = needs
    dx = dw1 = db1 = dw2 = db2 = hidden = None
    if need_db2:
        assert b2_dtype is not None
        db2 = sum_rows(dy, b2_dtype)
    if need_dx or need_dw1 or need_db1:
        if own(x.dtype, x.shape[0]):
            dpre, hidden = product(dy, w2, activation=activation, slope_of=pre, keep_value=need_dw2)
            db1 = sum_rows(dpre, b1_dtype) if need_db1 and b1_dtype else None
        else:
            dpre, hidden, db1 = activate_backward(
                input_gradient(dy, w2), pre, activation, x.dtype, b1_dtype if need_db1 else None,
                need_y=need_dw2,
            )  # fmt: skip
        if need_dx:
            dx = input_gradient(dpre, w1)
        if need_dw1:
            dw1 = weight_gradient(dpre, x, w1_dtype)
    elif need_dw2:
        hidden, _ = activate(pre, None, activation, x.dtype, keep_pre=False)
    if need_dw2:
        assert hidden is not None
        dw2 = weight_gradient(dy, hidden, w2_dtype)
    return dx, dw1, db1, dw2, db2
