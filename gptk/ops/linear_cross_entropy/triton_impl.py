"""linear_cross_entropy by Triton: logits = x W^T + b are not held, or only a part of them.

In 16 bits logits never reach memory (triton_logits, after Wijmans et al. 2024, Cut Cross-Entropy,
https://arxiv.org/abs/2411.09009): forward keeps three numbers for each row and tile of classes.
Backward forms the logits again, `chunk_classes` classes at a time, as dlogits in 16 bits, and two
cuBLAS products follow:

    dx += dlogits W[chunk]        in float32 over the chunks, rounded once
    dW[chunk] = dlogits^T x       over all rows at once, so no second dW is held

Beside Cut Cross-Entropy: no locks and no atomics (the same inputs give the same bits), and no tile
of small gradients is left out. A chunk of rows instead would read and write all of dW in float32
for each. float32 and float64 take chunks of rows and cuBLAS products only (triton_chunks).
"""

import torch
import triton
from torch import Tensor

from gptk.ops.gelu.triton_impl import unsupported as unsupported
from gptk.ops.linear.triton_impl import product, sum_partials
from gptk.ops.linear_cross_entropy import triton_chunks
from gptk.ops.linear_cross_entropy.triton_dlogits import logit_gradients
from gptk.ops.linear_cross_entropy.triton_logits import Terms, in_sixteens
from gptk.ops.linear_cross_entropy.triton_losses import losses

ROWS = 2**16
"""Rows whose three numbers per tile of classes exist at once."""


def chunk_classes(N: int, V: int) -> int:
    """Classes whose dlogits exist at once: an eighth of the vocabulary in a multiple of 256, more
    up to 2^24 dlogits (32 MiB), but at most 2^28 (512 MiB) unless 256 classes are more."""
    some = max(V // 8, 2**24 // N)
    return min(V, max(256, min(some, 2**28 // N) // 256 * 256))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), both (N,) in the accumulation dtype, for x (N, C), weight (V, C), bias (V,)."""
    terms = Terms(ignore_index, label_smoothing, softcap, z_loss)
    if x.element_size() > 2:
        return triton_chunks.forward(x, weight, bias, target, terms)
    loss = x.new_empty(x.shape[0], dtype=torch.float32)
    lse = torch.empty_like(loss)
    x, weight = in_sixteens(x), in_sixteens(weight)
    for first in range(0, x.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        losses(loss[rows], lse[rows], x[rows], weight, bias, target[rows], terms)
    return loss, lse


def backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    needs: tuple[bool, bool, bool],
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias); needs names those wanted, the others are None."""
    terms = Terms(ignore_index, label_smoothing, softcap, z_loss)
    dtypes = (weight_dtype, bias_dtype)
    if x.element_size() > 2:
        return triton_chunks.backward(dloss, x, weight, bias, target, lse, *dtypes, needs, terms)
    N, V = x.shape[0], weight.shape[0]
    need_dx, need_dweight, need_dbias = needs
    dx: Tensor | None = None
    dweight = weight.new_empty(weight.shape, dtype=weight_dtype) if need_dweight else None
    dbias = None if bias_dtype is None or not need_dbias else weight.new_empty(V, dtype=bias_dtype)
    operands = in_sixteens(x), in_sixteens(weight)
    step = chunk_classes(N, V)
    # rows that begin at multiples of 16 bytes: wide stores, and products by tensor cores
    buffer = x.new_empty((N, triton.cdiv(step, 16) * 16))
    for first in range(0, V, step):
        classes = slice(first, min(first + step, V))
        dlogits = buffer[:, : classes.stop - first]
        sums = logit_gradients(
            buffer, dloss, lse, *operands, bias, target, classes, terms, need_dbias
        )
        if need_dx:
            dx = product(dlogits, weight[classes], torch.float32, dx)
        if dweight is not None:
            dweight[classes] = product(dlogits.t(), x, weight_dtype)
        if dbias is not None and sums is not None:
            sum_partials(dbias[classes], sums)
    return None if dx is None else dx.to(x.dtype), dweight, dbias
