"""gelu: the contract, its checks and the one autograd.Function."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gptk.ops.contract import backend_of, is_reference, resolve
from gptk.ops.gelu import compiled
from gptk.ops.tensors import addressable, once_differentiable, outside_autocast, readable


def gelu(input: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """y = x * Phi(x) ("none"), or x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)) ("tanh").

    Args:
        input: any shape, any strides, floating point.
        approximate: "none" or "tanh".
        backend: auto, torch, triton or cpp.

    Returns: the input's shape and dtype.
    Raises: ValueError for another `approximate`. Unsupported: the named backend cannot run this.
    Numerics: computed in float32 (float64 for float64); finite for every finite input.
    Memory: reads and writes each element once. Deterministic: elementwise.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r}; allowed: 'none', 'tanh'")
    impl = resolve("gelu", backend, input)
    if is_reference(impl) or input.numel() == 0:
        from gptk.ops.gelu.reference import gelu as definition

        return definition(input, approximate)
    if not addressable(input):
        return compiled.op(input.contiguous(), approximate, backend_of(impl))
    return GeluFunction.apply(impl, input, approximate)


class GeluFunction(torch.autograd.Function):
    """Saves the input."""

    @staticmethod
    @outside_autocast
    def forward(ctx: Any, impl: ModuleType, input: Tensor, approximate: str) -> Tensor:
        x = readable(input)
        ctx.save_for_backward(x)
        ctx.impl, ctx.approximate = impl, approximate
        return impl.forward(x, approximate)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return None, ctx.impl.backward(readable(dy), x, ctx.approximate), None
