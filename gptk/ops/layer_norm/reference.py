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
    if residual is None:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    residual = residual + dropout(input, dropout_p, seed)
    return F.layer_norm(residual, normalized_shape, weight, bias, eps), residual
