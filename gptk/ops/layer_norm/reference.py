"""LayerNorm: the definition, and the torch backend."""

import torch.nn.functional as F
from torch import Tensor

from gptk.random import Seed, dropout


def layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Ba et al. 2016, https://arxiv.org/abs/1607.06450; a residual is added first and returned."""
    if residual is not None:
        if dropout_p:  # a row of the mask: the normalised dimensions
            rows = input.flatten(-len(normalized_shape))
            input = dropout(rows, dropout_p, seed).reshape(input.shape)
        input = residual + input
    if input.dtype.itemsize == 2:  # torch would sum 16-bit weight gradients in 16 bits
        weight, bias = (None if p is None else p.float() for p in (weight, bias))
        y = F.layer_norm(input.float(), normalized_shape, weight, bias, eps).to(input.dtype)
    else:
        y = F.layer_norm(input, normalized_shape, weight, bias, eps)
    return y if residual is None else (y, input)
