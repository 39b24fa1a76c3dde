"""GELU: the definition, and the torch backend."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415: x * Phi(x), or its tanh form.

    Past +-30 both forms are x or 0 to all digits; torch's own derivative is NaN from 1e10 on.
    """
    middle = F.gelu(input.clamp(-30.0, 30.0), approximate=approximate)
    return torch.where(input.abs() > 30.0, input.relu(), middle)
