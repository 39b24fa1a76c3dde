"""mlp: torch's matrix products with the C++ extension's epilogues (csrc/cpu/gelu.cpp).

The activation is not stored: backward computes it from `pre` again, in the pass over `pre` that the
activation's slope and the first bias gradient need anyway.
"""

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
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(y, pre) for x (M, C), w1 (hidden, C), w2 (C_out, hidden)."""
    dtype = x.dtype
    wide = product_dtype(dtype)
    hidden, pre = activate(product(x.to(wide), w1.to(wide)), b1, activation, dtype, keep_pre=True)
    assert pre is not None
    if wide == dtype:
        return product(hidden, w2, b2), pre
    y, _ = activate(product(hidden.to(wide), w2.to(wide)), b2, None, dtype, keep_pre=False)
    return y, pre


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
    wide = product_dtype(x.dtype)
    dx = dw1 = db1 = dw2 = db2 = None
    if need_db2:
        assert b2_dtype is not None
        db2 = sum_rows(dy, b2_dtype)
    if need_dx or need_dw1 or need_db1:
        dhidden = torch.mm(dy.to(wide), w2.to(wide))
        dpre, hidden, db1 = activate_backward(
            dhidden, pre, activation, wide, b1_dtype if need_db1 else None, need_y=need_dw2
        )
        if need_dx:
            dx = torch.mm(dpre, w1.to(wide)).to(x.dtype)
        if need_dw1:
            dw1 = weight_gradient(dpre, x, w1_dtype)
    elif need_dw2:
        hidden, _ = activate(pre, None, activation, wide, keep_pre=False)
    else:
        hidden = None
    if need_dw2:
        assert hidden is not None
        dw2 = weight_gradient(dy, hidden, w2_dtype)
    return dx, dw1, db1, dw2, db2
