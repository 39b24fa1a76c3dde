"""The validation loss: a fixed, ordered pass that leaves no trace in the run."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptk.text.bits import bits_per_byte

IGNORE = -100
"""A target that does not count."""


class Score(NamedTuple):
    """Result of a pass over a split."""

    nats: float  # mean loss per target token
    bits_per_byte: float  # over the targets that stand for text; special tokens do not
    tokens: int


class Interrupted(Exception):
    """A pass was stopped before its end."""


@contextlib.contextmanager
def evaluating(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode is put back after.

    `modules`: the model's, where they are known (to collect them takes as long as a small layer).
    """
    training = [m for m in (model.modules() if modules is None else modules) if m.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    autocast: contextlib.AbstractContextManager[object],
    stop: Callable[[], bool] = lambda: False,
) -> Score:
    """Sum of the losses over all targets, in nats per token and bits per byte.

    Args:
        batches: (idx, targets) of the windows, in order, each (B, T) on the
            model's device; B may differ.
        token_bytes: (V,) int64, bytes of text in each token.
        autocast: entered around each forward pass; reusable.
        stop: asked before each batch.

    Raises:
        Interrupted: `stop` said so.
    """
    nats, tokens, text_nats, n_bytes = 0.0, 0, 0.0, 0
    with evaluating(model):
        for idx, targets in batches:
            if stop():
                raise Interrupted
            with autocast:
                losses = model(idx, targets, reduction="none", seed=0).double().cpu()
            flat = targets.flatten().cpu()
            sizes = torch.where(flat == IGNORE, 0, token_bytes[flat.clamp_min(0)])
            nats += float(losses.sum())
            tokens += int((flat != IGNORE).sum())
            text_nats += float(losses.flatten()[sizes > 0].sum())
            n_bytes += int(sizes.sum())
    if tokens == 0:
        raise ValueError("the validation split holds no target token")
    return Score(nats / tokens, bits_per_byte([text_nats], [n_bytes]), tokens)
