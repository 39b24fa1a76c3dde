"""Whom gptk's kernels are timed against: PyTorch eager, compiled, its attention kernels, Liger."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gptk.functional as GF
from gptk.bench import providers

Provider = Callable[..., Any]
OURS, EAGER, COMPILED = "gptk triton", "torch", "torch.compile"
FLASH, CUDNN, LIGER = "SDPA flash", "SDPA cuDNN", "Liger"
FOREACH, COPY = "torch foreach", "copy"


def ours(op: str) -> Provider:
    function = getattr(GF, op)
    return lambda **values: function(**values, backend="triton")


def of(op: str, device: str) -> dict[str, Provider]:
    """Name -> callable with the keywords of the op's cases; ours first."""
    found: dict[str, Provider] = {OURS: ours(op)}
    if op == "attention":
        found[FLASH] = _sdpa(SDPBackend.FLASH_ATTENTION)
        if device == "cuda":
            found[CUDNN] = _sdpa(SDPBackend.CUDNN_ATTENTION)
        found[COMPILED] = _compiled(op, device)
        return found
    found[EAGER] = providers.TORCH[op]
    found[COMPILED] = _compiled(op, device)
    if device == "cuda" and importlib.util.find_spec("liger_kernel") is not None and op in LIGERS:
        found[LIGER] = LIGERS[op]
    return found


def _compiled(op: str, device: str) -> Provider:
    torch._dynamo.reset()  # one function is compiled for a few sizes, then no more
    if op == "attention":  # its backward is timed alone, again and again over one graph
        torch._functorch.config.donated_buffer = False
    # a dry run has no use for the minutes of compiling
    engine = "inductor" if device == "cuda" else "eager"
    return torch.compile(providers.TORCH[op], dynamic=False, backend=engine)


def _sdpa(backend: SDPBackend) -> Provider:
    def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, **_: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return attention


def _liger(name: str) -> Any:
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


def _liger_layer_norm(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, **_: Any
) -> Any:
    h = input if residual is None else input + residual
    y = _liger("liger_layer_norm")(h, weight, bias, 1e-5)
    return y if residual is None else (y, h)


def _liger_cross_entropy(input: Tensor, target: Tensor, **_: Any) -> Tensor:
    # it writes the gradient into its input, which the timing needs again
    return _liger("liger_cross_entropy")(input.clone(), target)


def _liger_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, **_: Any
) -> Tensor:
    flat = input.flatten(0, -2)
    return _liger("liger_fused_linear_cross_entropy")(flat, linear_weight, target.flatten())


LIGERS: dict[str, Provider] = {
    "layer_norm": _liger_layer_norm,
    "cross_entropy": _liger_cross_entropy,
    "linear_cross_entropy": _liger_linear_cross_entropy,
}
