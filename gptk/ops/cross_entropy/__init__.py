"""cross_entropy: the contract, its checks and its autograd functions."""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from gptk.ops.contract import backend_of, is_reference, resolve, transformed
from gptk.ops.cross_entropy import compiled
from gptk.ops.cross_entropy.compiled import dense_rows, gradient_of_rows, reduce
from gptk.ops.tensors import (
    addressable,
    autocast_dtype,
    once_differentiable,
    outside_autocast,
    readable,
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """loss = lse - (1 - s) z[target] - s / V sum(z) + z_loss lse^2, per row, then reduced, where
    lse = logsumexp(z) and z = softcap tanh(input / softcap), or the input itself.

    Args:
        input: (N, V) logits; other shapes, class weights and probability targets run on torch only.
        target: (N,) class ids of any integer dtype, or ignore_index.
        reduction: "none", "mean" (over the targets that count; nan if none does) or "sum".
        label_smoothing: s in [0, 1].
        softcap: above 0; None leaves the logits as they are.
        z_loss: at least 0; what pulls lse, the logarithm of softmax's denominator, to 0. For class
            ids without class weights: a mean with these is not over rows, which lse^2 is of.
        backend: auto, torch, triton or cpp.

    Returns: as torch.nn.functional.cross_entropy, in the input's dtype (under autocast float32
        for 16-bit logits).
    Raises: ValueError for shapes, dtypes or devices that do not fit, and for an option outside its
        range. IndexError for a target outside [0, V) on the CPU; on a GPU, under torch.compile or
        vmap that row's loss is NaN (backend torch: what torch.nn.functional.cross_entropy does).
    Numerics: log-sum-exp and gradient in float32 (float64 for float64).
    Reference: softcap: Gemma 2, https://arxiv.org/abs/2408.00118; z_loss: PaLM, section 5,
        https://arxiv.org/abs/2204.02311.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce, False)
    check_reduction(reduction, label_smoothing)
    check_terms(softcap, z_loss)
    by_id = not target.is_floating_point()
    if z_loss and (weight is not None or not by_id):
        kind = "class weights" if weight is not None else "class probabilities as targets"
        raise ValueError(
            f"z_loss={z_loss} with {kind}: it is a term of rows that count alike, by a class id"
        )
    if autocast_dtype(input) is not None:
        input = input.float()
    if target.device != input.device:
        raise ValueError(f"target is on {target.device}, input on {input.device}")
    if weight is not None and weight.device != input.device:
        raise ValueError(f"weight is on {weight.device}, input on {input.device}")
    if by_id:
        target = as_class_ids(target)
    plain = by_id and weight is None and input.dim() == 2
    impl = resolve("cross_entropy", backend, input, plain=plain)
    if plain:
        check_targets(target, input.shape[:1], input.shape[1], ignore_index)
    if is_reference(impl) or not plain or input.numel() == 0:
        from gptk.ops.cross_entropy.reference import cross_entropy as definition

        return definition(
            input, target, weight, ignore_index, reduction, label_smoothing, softcap, z_loss
        )
    options = (ignore_index, label_smoothing, softcap, z_loss)
    if not addressable(input, target):
        x = input if input.stride(-1) == 1 else input.contiguous()
        loss = compiled.op(x, target.contiguous(), *options, reduction, backend_of(impl))[0]
        return loss.to(input.dtype)
    if reduction == "none":
        loss = CrossEntropyFunction.apply(impl, input, target, *options)
        return loss if loss.dtype == input.dtype else loss.to(input.dtype)
    return ReducedFunction.apply(impl, input, target, reduction, *options)


def check_reduction(reduction: str, label_smoothing: float) -> None:
    """Raise ValueError unless both are what torch allows."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; allowed: 'none', 'mean', 'sum'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} is not in [0, 1]")


def check_terms(softcap: float | None, z_loss: float) -> None:
    """Raise ValueError unless the softcap is above 0 and z_loss at least 0, both finite."""
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} is not a finite number above 0")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss} is not a finite number of at least 0")


def as_class_ids(target: Tensor) -> Tensor:
    """The targets in int64; ValueError unless their dtype is an integer one."""
    dtype = target.dtype
    if dtype == torch.int64:
        return target
    if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        raise ValueError(f"target is {dtype}, class ids are integers")
    return target.to(torch.int64)


def check_targets(target: Tensor, rows: torch.Size, V: int, ignore_index: int) -> None:
    """Raise unless there is one target for each of the rows, an id in [0, V) or ignore_index.

    Ids are read on the CPU only, and not where a program is traced.
    """
    if target.shape != rows:
        raise ValueError(f"target {tuple(target.shape)} for rows of logits {tuple(rows)}")
    if target.is_cpu and not transformed() and addressable(target) and target.numel():
        read_ids(target, V, ignore_index)


def read_ids(target: Tensor, V: int, ignore_index: int) -> None:
    """Raise unless each id is in [0, V) or ignore_index."""
    low, high = target.aminmax()
    if low.item() >= 0 and high.item() < V:
        return
    bad = ((target < 0) | (target >= V)) & (target != ignore_index)
    if bad.any():
        raise IndexError(f"target {target[bad][0].item()} is outside [0, {V})")


class CrossEntropyFunction(torch.autograd.Function):
    """Loss per row, unreduced. Saves the logits, the targets and the log-sum-exp."""

    @staticmethod
    @outside_autocast
    def forward(ctx: Any, impl: ModuleType, input: Tensor, target: Tensor, *options: Any) -> Tensor:
        logits, target = _as_read(input, target)
        loss, lse = impl.forward(logits, target, *options)
        ctx.save_for_backward(logits, target, lse)
        ctx.impl, ctx.options = impl, options
        return loss

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dloss: Tensor) -> Any:
        dlogits = ctx.impl.backward(readable(dloss), *ctx.saved_tensors, *ctx.options)
        return None, dlogits, None, *(None for _ in ctx.options)


class ReducedFunction(torch.autograd.Function):
    """The sum or mean of the losses, in the input's dtype: one autograd node."""

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any, impl: ModuleType, input: Tensor, target: Tensor, reduction: str, *options: Any
    ) -> Tensor:
        logits, target = _as_read(input, target)
        loss, lse = impl.forward(logits, target, *options)
        result, counted = reduce(loss, target, options[0], reduction)
        ctx.save_for_backward(logits, target, lse, counted)
        ctx.impl, ctx.options = impl, options
        return result.to(input.dtype)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, upstream: Tensor) -> Any:
        logits, target, lse, counted = ctx.saved_tensors
        dloss = gradient_of_rows(upstream, counted, lse)
        dlogits = ctx.impl.backward(dloss, logits, target, lse, *ctx.options)
        return None, dlogits, None, None, *(None for _ in ctx.options)


def _as_read(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(logits with adjacent columns, target) as the kernels read them by address."""
    return dense_rows(input), readable(target)
