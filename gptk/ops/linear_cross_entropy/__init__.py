"""linear_cross_entropy: the contract, its checks and the one autograd.Function."""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gptk.ops.contract import (
    backend_of,
    constant_when_traced,
    implementation,
    is_reference,
    resolve,
)
from gptk.ops.cross_entropy import as_class_ids, check_reduction, check_targets, check_terms
from gptk.ops.cross_entropy.compiled import reduce
from gptk.ops.linear import check_product
from gptk.ops.linear_cross_entropy import compiled
from gptk.ops.linear_cross_entropy.compiled import as_read, known_gradient_of_rows
from gptk.ops.tensors import (
    addressable,
    autocast_dtype,
    once_differentiable,
    outside_autocast,
    readable,
)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(input @ linear_weight.T + linear_bias, target), logits never held as a whole.

    Args:
        input: (..., C); linear_weight: (V, C); linear_bias: (V,) or None.
        target: (...) class ids of any integer dtype, or ignore_index.
        reduction, ignore_index (None: -100), label_smoothing, softcap (after the bias), z_loss: as
            in cross_entropy.
        backend: auto, torch, triton or cpp.

    Returns: the loss, in the input's dtype (under autocast float32, except for float64).
    Raises: as cross_entropy.
    Memory: a part of the logits at a time, at most; extra memory grows with N * V up to a bound (1
        GiB, usually much less) and then no more. The C++ backend forms the gradients of "mean" and
        "sum" with the loss, and holds them until backward.
    """
    check_reduction(reduction, label_smoothing)
    check_terms(softcap, z_loss)
    check_product("linear_weight", input, linear_weight, linear_bias)
    ignore = -100 if ignore_index is None else ignore_index
    cast = autocast_dtype(input)
    if target.device != input.device:
        raise ValueError(f"target is on {target.device}, input on {input.device}")
    target = as_class_ids(target)
    check_targets(target, input.shape[:-1], linear_weight.shape[0], ignore)
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    flat = target if target.dim() == 1 else target.reshape(-1)
    impl = resolve("linear_cross_entropy", backend, input, cast)
    options = (ignore, label_smoothing, softcap, z_loss)
    if is_reference(impl) or input.numel() == 0 or linear_weight.numel() == 0:
        from gptk.ops.linear_cross_entropy.reference import linear_cross_entropy as definition

        loss = definition(rows, linear_weight, flat, linear_bias, *options)
        loss, _ = reduce(loss, flat, ignore, reduction)
    elif not addressable(rows, linear_weight, linear_bias, flat):
        loss = _traced(impl, rows, linear_weight, linear_bias, flat, options, cast, reduction)
    elif (
        reduction != "none"
        and hasattr(impl, "loss_and_gradients")
        and _gradients_come_with_the_loss(cast or input.dtype, input, linear_weight, linear_bias)
    ):
        loss = ReducedFunction.apply(
            impl, rows, linear_weight, linear_bias, flat, cast, reduction, *options
        )
    else:
        loss = LinearCrossEntropyFunction.apply(
            impl, rows, linear_weight, linear_bias, flat, cast, *options
        )
        loss, _ = reduce(loss, flat, ignore, reduction)
    if reduction == "none" and target.dim() != 1:
        loss = loss.view(target.shape)
    return loss if cast is not None or loss.dtype == input.dtype else loss.to(input.dtype)


def _traced(
    impl: ModuleType,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: tuple[int, float, float | None, float],
    cast: torch.dtype | None,
    reduction: str,
) -> Tensor:
    """The call as a custom op: the same gradients come with the loss as in eager mode."""
    dtype, parts = cast or rows.dtype, (rows, weight, bias)
    early = (
        reduction != "none"
        and _forms_gradients(backend_of(impl))
        and _gradients_come_with_the_loss(dtype, *parts)
    )
    with_loss = [early and t is not None and t.requires_grad for t in parts]
    inputs = (rows.to(dtype).contiguous(), weight, bias, target.contiguous())
    return compiled.op(*inputs, *options, reduction, with_loss, backend_of(impl))[0]


def _gradients_come_with_the_loss(compute: torch.dtype, *tensors: Tensor | None) -> bool:
    """Not in float16: what a GradScaler multiplies the loss by has to be in the gradients of the
    logits before they are rounded, or they underflow."""
    kinds = {compute, *(t.dtype for t in tensors if t is not None)}
    return torch.float16 not in kinds and torch.is_grad_enabled()


@constant_when_traced  # a traced program has the implementation's name only
def _forms_gradients(backend: str) -> bool:
    return hasattr(implementation("linear_cross_entropy", backend), "loss_and_gradients")


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Loss per row, unreduced. Saves the rows, the weight, the targets and the log-sum-exp."""

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any,
        impl: ModuleType,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        cast: torch.dtype | None,
        *options: Any,
    ) -> Tensor:
        dtype = cast or input.dtype
        x, w, b, target = as_read(impl, dtype, input, weight, bias, target)
        loss, lse = impl.forward(x, w, b, target, *options)
        ctx.save_for_backward(x, w, b, target, lse)
        ctx.impl, ctx.options = impl, options
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.input_dtype = input.dtype
        return loss

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dloss: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:4]
        dx, dw, db = ctx.impl.backward(
            readable(dloss), *ctx.saved_tensors, *ctx.dtypes, needs, *ctx.options
        )
        dx = None if dx is None else dx.to(ctx.input_dtype)
        return None, dx, dw, db, None, None, *(None for _ in ctx.options)


class ReducedFunction(torch.autograd.Function):
    """The sum or mean of the losses. What each row's loss is multiplied by is known in forward, so
    the gradients are formed there, from logits that exist once; backward multiplies by the loss's
    own gradient, where that is not 1. A second backward (retain_graph) forms them again."""

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any,
        impl: ModuleType,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        cast: torch.dtype | None,
        reduction: str,
        *options: Any,
    ) -> Tensor:
        dtype = cast or input.dtype
        x, w, b, target = as_read(impl, dtype, input, weight, bias, target)
        ignore_index = options[0]
        dtypes = (weight.dtype, None if bias is None else bias.dtype)
        needs = ctx.needs_input_grad[1:4]
        if not any(needs):
            loss, _ = impl.forward(x, w, b, target, *options)
            return reduce(loss, target, ignore_index, reduction)[0]
        dloss, counted = known_gradient_of_rows(x, target, ignore_index, reduction)
        loss, lse, ctx.gradients = impl.loss_and_gradients(
            x, w, b, target, dloss, *dtypes, needs, *options
        )
        ctx.save_for_backward(x, w, b, target, lse, dloss)
        ctx.impl, ctx.options, ctx.dtypes, ctx.input_dtype = impl, options, dtypes, input.dtype
        return loss.sum() if reduction == "sum" else loss.sum() / counted

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        scale = float(upstream)
        if gradients is None or not math.isfinite(scale):  # NaN stays out of ignored rows
            x, w, b, target, lse, dloss = ctx.saved_tensors
            gradients = ctx.impl.backward(
                dloss * upstream, x, w, b, target, lse, *ctx.dtypes,
                ctx.needs_input_grad[1:4], *ctx.options,
            )  # fmt: skip
        elif scale != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        dx, dw, db = gradients
        dx = None if dx is None else dx.to(ctx.input_dtype)
        return None, dx, dw, db, None, None, None, *(None for _ in ctx.options)
