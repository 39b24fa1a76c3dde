"""mlp by Triton: y = act(x W1^T + b1) W2^T + b2, with cuBLAS products and linear's epilogues.

Only `pre` = x W1^T + b1 is kept. Backward needs act(pre) for dw2, act'(pre) for dpre and the
column sums of dpre for db1: one pass over dhidden and pre yields all three, so the activation
costs no memory between forward and backward and no extra read of pre.
"""

import torch
from torch import Tensor

from gptk.ops.gelu.triton_impl import activate
from gptk.ops.gelu.triton_impl import unsupported as unsupported
from gptk.ops.linear.triton_impl import activation_backward, column_sum, product


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """(y, pre) for x (M, C), w1 (hidden, C), w2 (C_out, hidden); pre (M, hidden)."""
    pre = product(x, w1.t(), x.dtype, b1)
    return product(activate(pre, activation), w2.t(), x.dtype, b2), pre


def backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    w1: Tensor,
    w2: Tensor,
    activation: str | None,
    dtypes: tuple[torch.dtype, torch.dtype | None, torch.dtype, torch.dtype | None],
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw1, db1, dw2, db2); dtypes are those of w1, b1, w2, b2."""
    w1_dtype, b1_dtype, w2_dtype, b2_dtype = dtypes
    need_dx, need_dw1, need_db1, need_dw2, need_db2 = needs
    dx = dw1 = db1 = dw2 = db2 = hidden = None
    if need_db2:
        assert b2_dtype is not None
        db2 = column_sum(dy, b2_dtype)
    if need_dx or need_dw1 or need_db1:
        dhidden = product(dy, w2, x.dtype)  # (M, hidden)
        dpre, hidden, db1 = activation_backward(
            dhidden, pre, activation, b1_dtype if need_db1 else None, need_y=need_dw2
        )
        dx = product(dpre, w1, x.dtype) if need_dx else None
        dw1 = product(dpre.t(), x, w1_dtype) if need_dw1 else None
    elif need_dw2:
        hidden = activate(pre, activation)
    if need_dw2:
        assert hidden is not None
        dw2 = product(dy.t(), hidden, w2_dtype)
    return dx, dw1, db1, dw2, db2
