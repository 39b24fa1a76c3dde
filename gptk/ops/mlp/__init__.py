"""mlp: the contract, its checks and the one autograd.Function."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gptk.ops.contract import backend_of, is_reference, resolve
from gptk.ops.linear import check_activation, check_product
from gptk.ops.mlp import compiled
from gptk.ops.tensors import (
    addressable,
    autocast_dtype,
    once_differentiable,
    outside_autocast,
    parameter,
    readable,
)


def mlp(
    input: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: str | None = "gelu_tanh",
    backend: str | None = None,
) -> Tensor:
    """y = act(input @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias.

    Args:
        input: (..., C); fc_weight: (F, C); fc_bias: (F,) or None; proj_weight: (N, F);
            proj_bias: (N,) or None; one dtype, or any under autocast.
        activation: "gelu_tanh" (GPT-2's), "gelu" (erf) or None.
        backend: auto, torch, triton or cpp.

    Returns: (..., N) in the compute dtype (autocast's when it is on; it leaves float64 alone).
    Raises: ValueError for shapes or dtypes that do not fit. Unsupported: the named backend cannot.
    Memory: saves the activation's argument only; backward recomputes the activation.
    """
    check_activation(activation)
    check_product("fc_weight", input, fc_weight, fc_bias)
    check_product("proj_weight", input, proj_weight, proj_bias, fc_weight.shape[0])
    cast = autocast_dtype(input)
    impl = resolve("mlp", backend, input, cast)
    if is_reference(impl) or 0 in (input.numel(), fc_weight.numel(), proj_weight.numel()):
        from gptk.ops.mlp.reference import mlp as definition

        return definition(input, fc_weight, fc_bias, proj_weight, proj_bias, activation)
    parameters = (fc_weight, fc_bias, proj_weight, proj_bias)
    if not addressable(input, *parameters):
        x = input.to(cast or input.dtype).contiguous()
        return compiled.op(x, *parameters, activation, backend_of(impl))[0]
    return MlpFunction.apply(impl, input, *parameters, activation, cast)


class MlpFunction(torch.autograd.Function):
    """Saves the input, both weights and the activation's argument."""

    @staticmethod
    @outside_autocast
    def forward(ctx: Any, impl: ModuleType, input: Tensor, *rest: Any) -> Tensor:
        *parameters, activation, cast = rest
        dtype, shape = cast or input.dtype, input.shape
        x = readable(input if len(shape) == 2 else input.reshape(-1, shape[-1]), dtype)
        w1, b1, w2, b2 = (p if p is None else parameter(impl, p, dtype) for p in parameters)
        y, pre = impl.forward(x, w1, b1, w2, b2, activation)
        ctx.save_for_backward(x, pre, w1, w2)
        ctx.impl, ctx.activation, ctx.input = impl, activation, (shape, input.dtype)
        ctx.dtypes = tuple(None if p is None else p.dtype for p in parameters)
        if len(shape) != 2:  # not by a view: torch would refuse to change the output in place
            y.resize_(*shape[:-1], y.shape[-1])
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, pre, w1, w2 = ctx.saved_tensors
        dy = readable(dy if dy.dim() == 2 else dy.reshape(-1, w2.shape[0]))
        needs = ctx.needs_input_grad[1:6]
        dx, *grads = ctx.impl.backward(dy, x, pre, w1, w2, ctx.activation, ctx.dtypes, needs)
        shape, dtype = ctx.input
        return None, None if dx is None else dx.view(*shape).to(dtype), *grads, None, None
