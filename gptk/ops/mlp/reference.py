"""The GPT-2 MLP: the definition, and the torch backend."""

import torch.nn.functional as F
from torch import Tensor

from gptk.ops.linear.reference import activate


def mlp(
    input: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str | None = "gelu_tanh",
) -> Tensor:
    """act(input @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias."""
    hidden = activate(F.linear(input, fc_weight, fc_bias), activation)
    return F.linear(hidden, proj_weight, proj_bias)
