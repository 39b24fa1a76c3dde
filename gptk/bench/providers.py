"""Who is measured: PyTorch's own ops, eager and compiled, and gptk's backends, by one signature.

A provider takes the keyword arguments that the op's cases.py makes. PyTorch's is what an
experienced user would write: the fused op where PyTorch has one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptk.functional as GF
from gptk.ops.contract import why_not

Provider = Callable[..., Any]
PYTORCH, COMPILED = "PyTorch", "compile"
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def _layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    **_: Any,
) -> Any:
    if residual is None:
        return F.layer_norm(input, normalized_shape, weight, bias)
    h = residual + (F.dropout(input, dropout_p) if dropout_p else input)
    return F.layer_norm(h, normalized_shape, weight, bias), h


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    enable_gqa: bool,
    **_: Any,
) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, None, dropout_p, causal, scale=scale, enable_gqa=enable_gqa
    )


def _activate(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else F.gelu(x, approximate=GELU[activation])


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, **_: Any
) -> Tensor:
    return _activate(F.linear(input, weight, bias), activation)


def _mlp(
    input: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str | None = "gelu_tanh",
    **_: Any,
) -> Tensor:
    return F.linear(
        _activate(F.linear(input, fc_weight, fc_bias), activation), proj_weight, proj_bias
    )


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    reduction: str,
    label_smoothing: float,
    **_: Any,
) -> Tensor:
    # F.cross_entropy takes the classes second, so the rows of (B, T, V) have to be one dimension
    losses = F.cross_entropy(
        F.linear(input, linear_weight, linear_bias).flatten(0, -2),
        target.flatten(),
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return losses.view(target.shape) if reduction == "none" else losses


def _gelu(input: Tensor, approximate: str, **_: Any) -> Tensor:
    return F.gelu(input, approximate=approximate)


TORCH: dict[str, Provider] = {
    "layer_norm": _layer_norm,
    "attention": _attention,
    "gelu": _gelu,
    "linear": _linear,
    "mlp": _mlp,
    "cross_entropy": F.cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}


def providers(op: str, device: str, dtype: torch.dtype, backends: list[str]) -> dict[str, Provider]:
    """Name -> callable, PyTorch first; a backend that cannot run here is left out."""
    found: dict[str, Provider] = {PYTORCH: TORCH[op]}
    if COMPILED in backends:
        found[COMPILED] = torch.compile(TORCH[op], dynamic=False)
    for backend in backends:
        if backend != COMPILED and reason(op, backend, device, dtype) is None:
            found[f"gptk {backend}"] = _ours(op, backend)
    return found


def reason(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend of gptk is not measured, or None."""
    return None if backend == "auto" else why_not(op, backend, device, dtype)


def _ours(op: str, backend: str) -> Provider:
    function = getattr(GF, op)
    return lambda **values: function(**values, backend=backend)
