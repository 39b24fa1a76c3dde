"""linear_cross_entropy as a custom op (see gptk/ops/compiled.py)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptk.ops.compiled import (
    accumulation,
    custom_op,
    differentiable,
    dtype_of,
    needed,
    nothing,
)
from gptk.ops.contract import implementation
from gptk.ops.cross_entropy.compiled import gradient_of_rows, reduce
from gptk.ops.tensors import parameter, readable


def as_read(
    impl: Any,
    dtype: torch.dtype,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(input, weight, bias, target) as the implementation reads them by address."""
    b = None if bias is None else parameter(impl, bias, dtype)
    return readable(input, dtype), parameter(impl, weight, dtype), b, readable(target)


def known_gradient_of_rows(
    x: Tensor, target: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, int]:
    """(the gradient of each row's loss (N,) where the reduced loss's is 1, what the sum of the
    losses is divided by)."""
    counted, factor = 1, 1.0
    if reduction == "mean":
        counted = int((target != ignore_index).sum())
        factor = 1 / counted if counted else math.nan
    return x.new_full((x.shape[0],), factor, dtype=accumulation(x.dtype)), counted


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    with_loss: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss in the accumulation dtype, lse (N,), how many targets count, dinput, dweight, dbias).

    with_loss names the gradients that are formed with the loss; without one of them backward forms
    the logits again, and only then it is told how many targets count.
    """
    impl = implementation("linear_cross_entropy", backend)
    x, w, b, target = as_read(impl, input.dtype, input, weight, bias, target)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    if not any(with_loss):
        rows, lse = impl.forward(x, w, b, target, *options)
        loss, found = reduce(rows, target, ignore_index, reduction)
        counted = nothing(target) if found is None else found
        return loss, lse, counted, nothing(x), nothing(x), nothing(x)
    dloss, divisor = known_gradient_of_rows(x, target, ignore_index, reduction)
    dtypes = (weight.dtype, dtype_of(bias))
    rows, lse, gradients = impl.loss_and_gradients(
        x, w, b, target, dloss, *dtypes, tuple(with_loss), *options
    )
    loss = rows.sum() if reduction == "sum" else rows.sum() / divisor
    dx, dw, db = (nothing(x) if g is None else g for g in gradients)
    return loss, lse, nothing(target), dx, dw, db


def linear_cross_entropy_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    with_loss: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    lse = input.new_empty(input.shape[0], dtype=accumulation(input.dtype))
    loss = lse.new_empty(lse.shape if reduction == "none" else ())
    counts = reduction == "mean" and not any(with_loss)
    dx, dw, db = (
        nothing(input) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip((input, weight, bias), with_loss, strict=True)
    )
    return loss, lse, target.new_empty(()) if counts else nothing(target), dx, dw, db


def linear_cross_entropy_backward(
    dloss: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    counted: Tensor,
    dinput: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    with_loss: list[bool],
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Those of dinput, dweight and dbias that are needed."""
    formed = any(with_loss)
    all_formed = formed and all(f or not n for f, n in zip(with_loss, needs, strict=True))
    if all_formed and math.isfinite(float(dloss)):  # NaN stays out of ignored rows
        gradients = (dinput, dweight, dbias)
        return [g * dloss for g, need in zip(gradients, needs, strict=True) if need]
    impl = implementation("linear_cross_entropy", backend)
    x, w, b, target = as_read(impl, input.dtype, input, weight, bias, target)
    if formed:
        rows = known_gradient_of_rows(x, target, ignore_index, reduction)[0] * dloss
    else:
        rows = gradient_of_rows(dloss, counted if reduction == "mean" else None, lse)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    dtypes = (weight.dtype, dtype_of(bias))
    found = impl.backward(rows, x, w, b, target, readable(lse), *dtypes, tuple(needs), *options)
    return needed(found)


def linear_cross_entropy_backward_fake(
    dloss: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    counted: Tensor,
    dinput: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    with_loss: list[bool],
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    tensors = zip((input, weight, bias), needs, strict=True)
    return [t.new_empty(t.shape) for t, need in tensors if need and t is not None]


def _given(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> Sequence[Any]:
    return *inputs[:4], *outputs[1:], *inputs[4:]


op = differentiable(
    custom_op(linear_cross_entropy, linear_cross_entropy_fake),
    custom_op(linear_cross_entropy_backward, linear_cross_entropy_backward_fake),
    inputs=(0, 1, 2),
    given=_given,
)
