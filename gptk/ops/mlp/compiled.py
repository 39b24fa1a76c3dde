"""mlp as a custom op (see gptk/ops/compiled.py)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptk.ops.compiled import custom_op, differentiable, dtype_of, needed
from gptk.ops.contract import implementation
from gptk.ops.tensors import parameter, readable


def mlp(
    input: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(y (..., N), pre (M, F)); float32 parameters are rounded to the input's dtype."""
    impl = implementation("mlp", backend)
    w1, b1, w2, b2 = (
        None if p is None else parameter(impl, p, input.dtype)
        for p in (fc_weight, fc_bias, proj_weight, proj_bias)
    )
    x = readable(input.reshape(-1, input.shape[-1]))
    y, pre = impl.forward(x, w1, b1, w2, b2, activation)
    return y.view(*input.shape[:-1], y.shape[1]), pre


def mlp_fake(
    input: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y = input.new_empty(*input.shape[:-1], proj_weight.shape[0])
    return y, input.new_empty(math.prod(input.shape[:-1]), fc_weight.shape[0])


def mlp_backward(
    dy: Tensor,
    input: Tensor,
    pre: Tensor,
    fc_weight: Tensor,
    proj_weight: Tensor,
    activation: str | None,
    fc_bias_dtype: torch.dtype | None,
    proj_bias_dtype: torch.dtype | None,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Those of the gradients of input, fc_weight, fc_bias, proj_weight, proj_bias needed."""
    impl = implementation("mlp", backend)
    w1, w2 = (parameter(impl, p, input.dtype) for p in (fc_weight, proj_weight))
    dtypes = (fc_weight.dtype, fc_bias_dtype, proj_weight.dtype, proj_bias_dtype)
    x, dy = (readable(t.reshape(-1, t.shape[-1])) for t in (input, dy))
    dx, *rest = impl.backward(dy, x, pre, w1, w2, activation, dtypes, needs)
    return needed([None if dx is None else dx.view(input.shape), *rest])


def mlp_backward_fake(
    dy: Tensor,
    input: Tensor,
    pre: Tensor,
    fc_weight: Tensor,
    proj_weight: Tensor,
    activation: str | None,
    fc_bias_dtype: torch.dtype | None,
    proj_bias_dtype: torch.dtype | None,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    F, N = fc_weight.shape[0], proj_weight.shape[0]
    return needed(
        [
            input.new_empty(input.shape) if needs[0] else None,
            fc_weight.new_empty(fc_weight.shape) if needs[1] else None,
            input.new_empty(F, dtype=fc_bias_dtype) if needs[2] else None,
            proj_weight.new_empty(proj_weight.shape) if needs[3] else None,
            input.new_empty(N, dtype=proj_bias_dtype) if needs[4] else None,
        ]
    )


def _given(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> Sequence[Any]:
    input, w1, b1, w2, b2, activation, backend = inputs
    return input, outputs[1], w1, w2, activation, dtype_of(b1), dtype_of(b2), backend


op = differentiable(
    custom_op(mlp, mlp_fake),
    custom_op(mlp_backward, mlp_backward_fake),
    inputs=(0, 1, 2, 3, 4),
    given=_given,
)
