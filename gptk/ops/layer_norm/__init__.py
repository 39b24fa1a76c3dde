"""layer_norm: the contract, its checks and the one autograd.Function."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gptk.ops.contract import backend_of, is_reference, resolve
from gptk.ops.layer_norm import compiled
from gptk.ops.layer_norm.compiled import gradient_weight
from gptk.ops.tensors import (
    addressable,
    autocast_dtype,
    once_differentiable,
    outside_autocast,
    readable,
)
from gptk.random import Seed, check_probability, draw_seed, seed_tensor


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    backend: str | None = None,
) -> Any:
    """y = (h - mean) / sqrt(var + eps) * weight + bias, h = residual + dropout(input).

    Args:
        input: (..., *normalized_shape), any strides.
        normalized_shape: the trailing dimensions that are normalised together.
        weight, bias: normalized_shape; of h's dtype, or float32 beside a 16-bit h.
        eps: added to the variance, inside the root.
        residual: the input's shape; without it h = input.
        dropout_p: probability of dropping an element of input; needs residual.
        seed: of the mask (row: leading dimensions flattened, column: the normalised ones); None
            draws one.
        backend: auto, torch, triton or cpp.

    Returns:
        y, or (y, h) with residual; both in the promoted dtype of input and residual.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit. Unsupported: the named backend
            cannot run this.

    Numerics: statistics in float32 (float64 for float64), from the mean's differences; a
        constant row gives exactly the bias. Deterministic: reductions are fixed by shape.
    Memory: reads and writes each element of input, residual, h and y once.
    """
    shape = tuple(normalized_shape)
    _check(input, shape, weight, bias, residual, dropout_p)
    if autocast_dtype(input) is not None and input.device.type == "cuda":
        input = input.float()  # torch's autocast policy on CUDA
    if dropout_p and seed is None:
        seed = draw_seed()
    impl = resolve("layer_norm", backend, input, dropout=dropout_p > 0)
    seed = 0 if seed is None else seed
    if is_reference(impl) or input.numel() == 0:
        from gptk.ops.layer_norm.reference import layer_norm as definition

        return definition(input, shape, weight, bias, eps, residual, dropout_p, seed)
    if not addressable(input, weight, bias, residual):
        x, r = (None if t is None else t.contiguous() for t in (input, residual))
        drawn = seed_tensor(seed) if dropout_p else None
        options = (len(shape), eps, float(dropout_p), drawn, backend_of(impl))
        y, h, *_ = compiled.op(x, r, weight, bias, *options)
        return y if residual is None else (y, h)
    return LayerNormFunction.apply(
        impl, input, math.prod(shape), weight, bias, eps, residual, dropout_p, seed
    )


def _check(
    input: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
) -> None:
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"normalized_shape {shape} is not the end of {tuple(input.shape)}")
    if check_probability(dropout_p) and residual is None:
        raise ValueError("dropout_p drops elements of the branch that is added: give residual=")
    if residual is not None and residual.shape != input.shape:
        raise ValueError(f"residual {tuple(residual.shape)} for input {tuple(input.shape)}")
    h = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} for normalized_shape {shape}")
        if tensor.dtype != h and not (tensor.dtype == torch.float32 and h.itemsize == 2):
            raise ValueError(f"{name} is {tensor.dtype}, the rows are {h}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, input on {input.device}")


def _readable_as(tensor: Tensor | None, shape: tuple[int, ...]) -> Any:
    """readable(tensor) in another shape; a view takes longer than most of the rest."""
    if tensor is None:
        return None
    return readable(tensor if tensor.shape == shape else tensor.reshape(shape))


def _like(gradient: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    gradient = gradient if gradient.shape == shape else gradient.view(shape)
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


class LayerNormFunction(torch.autograd.Function):
    """Saves h (or the input), weight, mean and rstd, whatever the backend.

    The outputs are no views, or torch would refuse to change them in place. h is saved as it is
    returned: one tensor, so that changing it before backward is the error that it should be.
    """

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any,
        impl: ModuleType,
        input: Tensor,
        N: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        dropout_p: float,
        seed: Seed,
    ) -> Any:
        shape = input.shape
        rows = (shape.numel() // N, N)
        x, r = _readable_as(input, rows), _readable_as(residual, rows)
        w, b = _readable_as(weight, (N,)), _readable_as(bias, (N,))
        y, h, mean, rstd = impl.forward(x, w, b, eps, r, dropout_p, seed)
        w = gradient_weight(w, None if b is None else b.dtype, y)
        if shape != rows:
            y.resize_(*shape)
            if h is not None:
                h.resize_(*shape)
        ctx.save_for_backward(x if h is None else h, w, mean, rstd)
        ctx.impl, ctx.dropout_p, ctx.seed, ctx.shape = impl, dropout_p, seed, shape
        ctx.dtypes = (input.dtype, None if residual is None else residual.dtype)
        ctx.weight = None if weight is None else (weight.shape, weight.dtype)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.set_materialize_grads(False)
        return y if h is None else (y, h)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Any:
        if dy is None and dh is None:
            return (None,) * 9
        h, weight, mean, rstd = ctx.saved_tensors
        shape, need, used = ctx.shape, ctx.needs_input_grad, dy is not None
        if h.dim() != 2:
            h = h.view(mean.shape[0], -1)
        dy = torch.zeros_like(h) if dy is None else readable(dy)
        dh = None if dh is None else readable(dh)
        needs = (need[1], need[6], used and need[3], used and need[4])
        dx, dr, dw, db = ctx.impl.backward(
            dy, dh, h, weight, mean, rstd, *ctx.dtypes, ctx.dropout_p, ctx.seed, needs
        )
        same = dx is dr  # then one view for both: of two, each leaf would keep one as its gradient
        if shape != h.shape:
            dx = None if dx is None else dx.view(*shape)
            dr = dx if same else None if dr is None else dr.view(*shape)
        dw = None if dw is None else _like(dw, *ctx.weight)
        db = None if db is None else _like(db, *ctx.bias)
        return None, dx, None, dw, db, None, dr, None, None
