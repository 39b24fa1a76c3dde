"""How an op looks to torch.compile, torch.export and fake tensors: two custom ops, gptk::<op> and
gptk::<op>_backward.

Eager calls do not come here: a custom op costs tens of microseconds, an autograd.Function a few.
Both run the same implementations on the same arguments, so they give the same bits.

A custom op names its backend, changes no input, and none of its outputs is an input or another
output. What forward gives besides the results is for backward alone. backward returns the gradients
that `needs` asks for, those only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptk.ops.tensors import outside_autocast, refuse_double_backward

Gradients = Callable[[Sequence[Tensor | None], Sequence[Any], list[bool]], Sequence[Tensor | None]]


def custom_op(run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """gptk::<name of run>: `run` is what it does, `fake` gives its results' shapes and strides."""
    name = run.__name__
    op = torch.library.custom_op(f"gptk::{name}", outside_autocast(run), mutates_args=())
    op.register_fake(fake)
    return getattr(torch.ops.gptk, name).default


def differentiable(
    forward: Any,
    backward: Any,
    inputs: Sequence[int],
    given: Callable[[Sequence[Any], Sequence[Tensor]], Sequence[Any]],
    results: int = 1,
    gradients: Gradients | None = None,
) -> Any:
    """Make `backward` the derivative of `forward`, and refuse a derivative of `backward`.

    Args:
        forward, backward: what custom_op returned.
        inputs: places of forward's arguments that have gradients.
        given: (forward's arguments, its outputs) -> backward's arguments between the outputs'
            gradients and `needs`.
        results: forward's first outputs that are differentiable; the others are for backward.
        gradients: (gradients of the results, given, needs) -> one gradient for each of `inputs`;
            by default what backward returns.

    Returns: `forward`.
    """

    def all_gradients(
        upstream: Sequence[Tensor | None], values: Sequence[Any], needs: list[bool]
    ) -> Sequence[Tensor | None]:
        return spread(backward(*upstream, *values, needs), needs)

    find = gradients or all_gradients

    def remember(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        values = given(inputs, outputs)
        ctx.save_for_backward(*(v for v in values if isinstance(v, Tensor)))
        ctx.values = [_SAVED if isinstance(v, Tensor) else v for v in values]
        ctx.mark_non_differentiable(*outputs[results:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *upstream: Tensor | None) -> Any:
        refuse_double_backward()
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if all(dy is None for dy in upstream[:results]):
            return tuple(found)
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if v is _SAVED else v for v in ctx.values]
        needs = [ctx.needs_input_grad[place] for place in inputs]
        for place, gradient in zip(inputs, find(upstream[:results], values, needs), strict=True):
            found[place] = gradient
        return tuple(found)

    torch.library.register_autograd(forward, differentiate, setup_context=remember)
    torch.library.register_autograd(backward, _no_second_derivative)
    return forward


_SAVED = object()


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    with torch.enable_grad():
        refuse_double_backward()


def spread(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """What backward returned, None where nothing was needed."""
    rest = iter(found)
    return [next(rest) if need else None for need in needs]


def needed(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients that an implementation has formed, as backward returns them."""
    return [gradient for gradient in gradients if gradient is not None]


def nothing(like: Tensor) -> Tensor:
    """In the place of an output that a call does not have."""
    return like.new_empty(0)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums for tensors of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    """None for None."""
    return None if tensor is None else tensor.dtype
