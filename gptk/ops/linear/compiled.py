"""linear as a custom op (see gptk/ops/compiled.py). pre is empty without an activation."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptk.ops.compiled import custom_op, differentiable, dtype_of, needed, nothing
from gptk.ops.contract import implementation
from gptk.ops.tensors import parameter, readable


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str
) -> tuple[Tensor, Tensor]:
    """(y (..., N), pre (M, N)); a float32 weight or bias is rounded to the input's dtype."""
    impl, dtype = implementation("linear", backend), input.dtype
    w = parameter(impl, weight, dtype)
    b = None if bias is None else parameter(impl, bias, dtype)
    y, pre = impl.forward(readable(input.reshape(-1, input.shape[-1])), w, b, activation)
    return y.view(*input.shape[:-1], y.shape[1]), nothing(y) if pre is None else pre


def linear_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str
) -> tuple[Tensor, Tensor]:
    y = input.new_empty(*input.shape[:-1], weight.shape[0])
    pre = nothing(y) if activation is None else y.new_empty(math.prod(y.shape[:-1]), y.shape[-1])
    return y, pre


def linear_backward(
    dy: Tensor,
    input: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str | None,
    bias_dtype: torch.dtype | None,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Those of dinput, dweight and dbias that are needed."""
    impl = implementation("linear", backend)
    x = readable(input.reshape(-1, input.shape[-1]))
    w = parameter(impl, weight, input.dtype)
    dy, saved = readable(dy.reshape(-1, w.shape[0])), None if activation is None else pre
    dx, *rest = impl.backward(dy, x, w, saved, activation, weight.dtype, bias_dtype, needs)
    return needed([None if dx is None else dx.view(input.shape), *rest])


def linear_backward_fake(
    dy: Tensor,
    input: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str | None,
    bias_dtype: torch.dtype | None,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    return needed(
        [
            input.new_empty(input.shape) if needs[0] else None,
            weight.new_empty(weight.shape) if needs[1] else None,
            weight.new_empty(weight.shape[0], dtype=bias_dtype) if needs[2] else None,
        ]
    )


def _given(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> Sequence[Any]:
    input, weight, bias, activation, backend = inputs
    return input, weight, outputs[1], activation, dtype_of(bias), backend


op = differentiable(
    custom_op(linear, linear_fake),
    custom_op(linear_backward, linear_backward_fake),
    inputs=(0, 1, 2),
    given=_given,
)
