"""cross_entropy as a custom op (see gptk/ops/compiled.py), and what a reduction does to the rows'
losses and to their gradients."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gptk.ops.compiled import accumulation, custom_op, differentiable, nothing
from gptk.ops.contract import implementation
from gptk.ops.tensors import readable


def reduce(
    loss: Tensor, target: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """(the rows' losses reduced, how many targets count: for "mean" only)."""
    if reduction == "none":
        return loss, None
    if reduction == "sum":
        return loss.sum(), None
    counted = (target != ignore_index).sum()
    return loss.sum() / counted, counted


def gradient_of_rows(upstream: Tensor, counted: Tensor | None, lse: Tensor) -> Tensor:
    """The gradient of each row's loss (N,), from the reduced loss's."""
    dloss = upstream.to(lse.dtype)
    if counted is not None:
        dloss = dloss / counted
    return dloss.expand(lse.shape).contiguous()


def dense_rows(t: Tensor) -> Tensor:
    """The logits as kernels read them by address: columns adjacent, rows apart by any stride."""
    return t if t.stride(-1) == 1 and not t.is_neg() else readable(t)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss in the accumulation dtype, lse (N,), how many targets count: for "mean" only)."""
    target = readable(target)
    impl = implementation("cross_entropy", backend)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    rows, lse = impl.forward(dense_rows(input), target, *options)
    loss, counted = reduce(rows, target, ignore_index, reduction)
    return loss, lse, nothing(target) if counted is None else counted


def cross_entropy_fake(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = input.new_empty(input.shape[0], dtype=accumulation(input.dtype))
    loss = lse.new_empty(lse.shape if reduction == "none" else ())
    return loss, lse, target.new_empty(()) if reduction == "mean" else nothing(target)


def cross_entropy_backward(
    dloss: Tensor,
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    counted: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """dinput."""
    dloss = gradient_of_rows(dloss, counted if reduction == "mean" else None, lse)
    impl = implementation("cross_entropy", backend)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    return [impl.backward(dloss, dense_rows(input), readable(target), readable(lse), *options)]


def cross_entropy_backward_fake(
    dloss: Tensor,
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    counted: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    return [input.new_empty(input.shape)]


def _given(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> Sequence[Any]:
    return *inputs[:2], *outputs[1:], *inputs[2:]


op = differentiable(
    custom_op(cross_entropy, cross_entropy_fake),
    custom_op(cross_entropy_backward, cross_entropy_backward_fake),
    inputs=(0,),
    given=_given,
)
