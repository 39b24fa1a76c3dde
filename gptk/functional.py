"""The ops as functions: torch.nn.functional's signatures, and `backend=`."""

from gptk.ops.attention import attention
from gptk.ops.cross_entropy import cross_entropy
from gptk.ops.gelu import gelu
from gptk.ops.layer_norm import layer_norm
from gptk.ops.linear import linear
from gptk.ops.linear_cross_entropy import linear_cross_entropy
from gptk.ops.mlp import mlp
from gptk.random import dropout

__all__ = [
    "attention",
    "cross_entropy",
    "dropout",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
]
