"""One optimizer step: gradients of several micro-batches, summed as one batch of all targets."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gptk.random import derive_seed
from gptk.train.evaluate import IGNORE

Batch = tuple[Tensor, Tensor]
"""(idx, targets), each (B, T) int64."""


def accumulate(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    *,
    seed: int,
    step: int,
    autocast: contextlib.AbstractContextManager[object] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, int]:
    """Add the gradient of the mean loss over ALL targets of `micro_batches` to the parameters.

    loss = sum of the losses of all targets / number of all targets, so any split into
    micro-batches, unequal ones and ones without a target included, gives the same step.

    Args:
        seed, step: the dropout masks are a function of these and of the micro-batch's index.

    Returns:
        (loss, number of targets); the loss is a 0-dim tensor without gradient, float32 at least.
        Without any target the loss is 0 and so is the gradient.
    """
    n_targets = sum(int((targets != IGNORE).sum()) for _, targets in micro_batches)
    total = torch.zeros((), device=micro_batches[0][0].device)
    for index, (idx, targets) in enumerate(micro_batches):
        with autocast or contextlib.nullcontext():
            loss = model(idx, targets, reduction="sum", seed=derive_seed(seed, step, index))
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32)) / max(n_targets, 1)
        (loss if scaler is None else scaler.scale(loss)).backward()
        total = total + loss.detach()
    return total, n_targets
