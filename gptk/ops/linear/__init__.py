"""linear: the contract, its checks and the one autograd.Function."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gptk.ops.contract import backend_of, is_reference, resolve
from gptk.ops.linear import compiled
from gptk.ops.tensors import (
    addressable,
    autocast_dtype,
    once_differentiable,
    outside_autocast,
    parameter,
    readable,
)

ACTIVATIONS = (None, "gelu", "gelu_tanh")


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = act(input @ weight.T + bias).

    Args:
        input: (..., K); weight: (N, K); bias: (N,) or None; one dtype, or any under autocast.
        activation: None, "gelu" (erf) or "gelu_tanh".
        backend: auto, torch, triton or cpp.

    Returns: (..., N) in the compute dtype (autocast's when it is on; it leaves float64 alone).
    Raises: ValueError for shapes or dtypes that do not fit. Unsupported: the named backend cannot.
    Numerics: weight and bias gradients leave float32 accumulators in the parameter's own dtype.
    """
    check_activation(activation)
    check_product("weight", input, weight, bias)
    cast = autocast_dtype(input)
    impl = resolve("linear", backend, input, cast)
    if is_reference(impl) or input.numel() == 0 or weight.numel() == 0:
        from gptk.ops.linear.reference import linear as definition

        return definition(input, weight, bias, activation)
    if not addressable(input, weight, bias):
        x = input.to(cast or input.dtype).contiguous()
        return compiled.op(x, weight, bias, activation, backend_of(impl))[0]
    return LinearFunction.apply(impl, input, weight, bias, activation, cast)


def check_activation(activation: str | None) -> None:
    """Raise ValueError unless the activation is one that the ops know."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}; allowed: None, 'gelu', 'gelu_tanh'")


def check_product(
    name: str, input: Tensor, weight: Tensor, bias: Tensor | None, columns: int | None = None
) -> None:
    """Raise ValueError unless input (..., K), weight (N, K) and bias (N,) fit together.

    `columns` stands for K where another product lies between the input and this weight.
    """
    if input.dim() == 0 or weight.dim() != 2:
        raise ValueError(f"{name} {tuple(weight.shape)} for input {tuple(input.shape)}")
    if weight.shape[1] != (input.shape[-1] if columns is None else columns):
        between = "" if columns is None else f" and {columns} columns between"
        raise ValueError(f"{name} {tuple(weight.shape)} for input {tuple(input.shape)}{between}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias {tuple(bias.shape)} for {name} {tuple(weight.shape)}")
    for other in (weight, bias):
        if other is None:
            continue
        if other.device != input.device:
            raise ValueError(f"{name} or bias on {other.device}, input on {input.device}")
        if other.dtype == input.dtype:
            continue
        if autocast_dtype(input) is None or other.dtype == torch.float64:
            raise ValueError(f"{name} or bias is {other.dtype}, input is {input.dtype}")


class LinearFunction(torch.autograd.Function):
    """Saves the input, the weight and, with an activation, its argument."""

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any,
        impl: ModuleType,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        cast: torch.dtype | None,
    ) -> Tensor:
        dtype, shape = cast or input.dtype, input.shape
        x = readable(input if len(shape) == 2 else input.reshape(-1, shape[-1]), dtype)
        w = parameter(impl, weight, dtype)
        b = None if bias is None else parameter(impl, bias, dtype)
        y, pre = impl.forward(x, w, b, activation)
        ctx.save_for_backward(x, w, pre)
        ctx.impl, ctx.activation, ctx.input = impl, activation, (shape, input.dtype)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        if len(shape) != 2:  # not by a view: torch would refuse to change the output in place
            y.resize_(*shape[:-1], w.shape[0])
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w, pre = ctx.saved_tensors
        dy = readable(dy if dy.dim() == 2 else dy.reshape(-1, w.shape[0]))
        needs = ctx.needs_input_grad[1:4]
        dx, dw, db = ctx.impl.backward(dy, x, w, pre, ctx.activation, *ctx.dtypes, needs)
        shape, dtype = ctx.input
        return None, None if dx is None else dx.view(*shape).to(dtype), dw, db, None, None
