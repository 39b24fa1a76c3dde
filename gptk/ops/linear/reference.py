"""Linear with an optional activation: the definition, and the torch backend."""

import torch.nn.functional as F
from torch import Tensor

from gptk.ops.gelu.reference import gelu


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """act(input @ weight.T + bias)."""
    return activate(F.linear(input, weight, bias), activation)


def activate(pre: Tensor, activation: str | None) -> Tensor:
    """None: itself; "gelu": erf form; "gelu_tanh": tanh form."""
    if activation is None:
        return pre
    return gelu(pre, "tanh" if activation == "gelu_tanh" else "none")
