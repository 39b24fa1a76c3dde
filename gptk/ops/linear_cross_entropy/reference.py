"""Linear + cross-entropy, chunked over rows: the definition, and the torch backend."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptk.ops.cross_entropy.reference import cross_entropy

CHUNK_ELEMENTS = 2**23  # logits that exist at one time


def linear_cross_entropy(
    input: Tensor,  # (N, C)
    linear_weight: Tensor,  # (V, C)
    target: Tensor,  # (N,)
    linear_bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """cross_entropy(input @ linear_weight.T + linear_bias, target) per row, (N,)."""
    acc = torch.promote_types(input.dtype, torch.float32)
    weight = linear_weight.to(acc)  # so that chunks add their weight gradients in fp32

    def rows(x: Tensor, w: Tensor, b: Tensor | None, t: Tensor) -> Tensor:
        logits = F.linear(x, w.to(x.dtype), b).to(acc)
        return cross_entropy(
            logits, t, None, ignore_index, "none", label_smoothing, softcap, z_loss
        )

    step = max(1, CHUNK_ELEMENTS // max(1, linear_weight.shape[0]))
    if input.shape[0] <= step:
        return rows(input, weight, linear_bias, target)
    return torch.cat(
        [
            checkpoint(rows, x, weight, linear_bias, t, use_reentrant=False)
            for x, t in zip(input.split(step), target.split(step), strict=True)
        ]
    )
