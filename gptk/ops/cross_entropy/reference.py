"""Cross-entropy: the definition, and the torch backend."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """-log softmax(z)[target] + z_loss logsumexp(z)^2, reduced; torch.nn.functional.cross_entropy
    of z = softcap tanh(input / softcap), or of the input."""
    z = input
    if softcap is not None or z_loss:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(
        z,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if z_loss:
        counts = target != ignore_index
        lse = z.logsumexp(min(1, z.dim() - 1)).masked_fill(~counts, 0.0)  # before it is squared
        rows = z_loss * lse.square()
        if reduction != "none":
            rows = rows.sum() / (counts.sum() if reduction == "mean" else 1)
        loss = loss + rows
    return loss.to(input.dtype)
