"""linear_cross_entropy by Triton: logits = x W^T + b live only for one chunk of rows at a time.

Each chunk is one cuBLAS product into accumulation-dtype logits and one launch of cross_entropy's
kernel, which adds the bias as it reads. Backward forms each chunk again; its kernel turns the
logits into dlogits in place (float32, float64) or into a 16-bit operand for the two products
dx = dlogits W and dW += dlogits^T x. dW and db stay in the accumulation dtype over all chunks and
are rounded once at the end.

Memory: chunk_rows(C, V, dtype) rows of logits, whatever N is, beside the outputs. Chunks are added
in order, so the same inputs give the same bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gptk.ops.cross_entropy.triton_impl import logit_gradients, losses
from gptk.ops.gelu.triton_impl import unsupported as unsupported
from gptk.ops.linear.triton_impl import column_sum, product
from gptk.ops.triton_launch import ACC


def chunk_rows(C: int, V: int, dtype: torch.dtype) -> int:
    """Rows per chunk, a power of two: never a function of the number of rows.

    Each chunk reads and writes all of dW (V x C), so about C rows make its own traffic no smaller
    than that; small vocabularies take up to 16 MiB of logits, and no chunk more than 256 MiB
    unless 16 rows are larger.
    """
    itemsize = ACC[dtype].itemsize
    rows = min(max(C, (16 << 20) // (V * itemsize)), (256 << 20) // (V * itemsize))
    return 1 << (max(rows, 16).bit_length() - 1)


def _chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits without bias), the logits in the accumulation dtype."""
    (N, C), V = x.shape, weight.shape[0]
    acc = ACC[x.dtype]
    if x.device.type == "cpu":
        weight = weight.to(acc)  # once; `product` would do it for every chunk
    step = chunk_rows(C, V, x.dtype)
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))
        yield rows, product(x[rows], weight.t(), acc)


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
    options = (ignore_index, label_smoothing, softcap, z_loss)
    loss = x.new_empty(x.shape[0], dtype=ACC[x.dtype])
    lse = torch.empty_like(loss)
    for rows, logits in _chunks(x, weight):
        losses(loss[rows], lse[rows], logits, bias, target[rows], *options)
        del logits  # before the next chunk is formed: one lives at a time
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
    options = (ignore_index, label_smoothing, softcap, z_loss)
    need_dx, need_dweight, need_dbias = needs
    acc = ACC[x.dtype]
    dx = torch.empty_like(x) if need_dx else None
    dweight = weight.new_zeros(weight.shape, dtype=acc) if need_dweight else None
    dbias = weight.new_zeros(weight.shape[0], dtype=acc) if need_dbias else None
    for rows, logits in _chunks(x, weight):
        dlogits = logits if logits.dtype == x.dtype else torch.empty_like(logits, dtype=x.dtype)
        logit_gradients(dlogits, dloss[rows], logits, bias, target[rows], lse[rows], *options)
        if dx is not None:
            dx[rows] = product(dlogits, weight, x.dtype)
        if dweight is not None and x.dtype == acc:
            dweight.addmm_(dlogits.t(), x[rows])
        elif dweight is not None:
            dweight += product(dlogits.t(), x[rows], acc)
        if dbias is not None:
            dbias += column_sum(dlogits, acc)
        del logits, dlogits
    if dweight is not None:
        dweight = dweight.to(weight_dtype)
    if dbias is not None:
        assert bias_dtype is not None
        dbias = dbias.to(bias_dtype)
    return dx, dweight, dbias
