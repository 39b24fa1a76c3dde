"""linear_cross_entropy in float32 and float64 by Triton: logits live only for one chunk of rows.

Each chunk is one cuBLAS product and one launch of cross_entropy's kernel, which adds the bias as it
reads. Backward forms each chunk again; its kernel turns the logits into dlogits in place, for the
two products dx = dlogits W and dW += dlogits^T x.

Memory: chunk_rows(C, V, dtype) rows of logits, whatever N is, beside the outputs. Chunks are added
in order, so the same inputs give the same bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gptk.ops.cross_entropy.triton_impl import logit_gradients, losses
from gptk.ops.linear.triton_impl import column_sum
from gptk.ops.linear_cross_entropy.triton_logits import Terms


def chunk_rows(C: int, V: int, dtype: torch.dtype) -> int:
    """Rows per chunk, a power of two: never a function of the number of rows.

    Each chunk reads and writes all of dW (V x C), so about C rows make its own traffic no smaller
    than that; small vocabularies take up to 16 MiB of logits, and no chunk more than 256 MiB
    unless 16 rows are larger.
    """
    itemsize = dtype.itemsize
    rows = min(max(C, (16 << 20) // (V * itemsize)), (256 << 20) // (V * itemsize))
    return 1 << (max(rows, 16).bit_length() - 1)


def _chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits without bias)."""
    (N, C), V = x.shape, weight.shape[0]
    step = chunk_rows(C, V, x.dtype)
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))
        yield rows, torch.mm(x[rows], weight.t())


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), both (N,), for x (N, C), weight (V, C), bias (V,)."""
    loss = x.new_empty(x.shape[0])
    lse = torch.empty_like(loss)
    for rows, logits in _chunks(x, weight):
        losses(loss[rows], lse[rows], logits, bias, target[rows], *terms)
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
    terms: Terms,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias); needs names those wanted, the others are None."""
    need_dx, need_dweight, need_dbias = needs
    dx = torch.empty_like(x) if need_dx else None
    dweight = weight.new_zeros(weight.shape) if need_dweight else None
    dbias = weight.new_zeros(weight.shape[0]) if need_dbias else None
    for rows, logits in _chunks(x, weight):
        logit_gradients(logits, dloss[rows], logits, bias, target[rows], lse[rows], *terms)
        if dx is not None:
            torch.mm(logits, weight, out=dx[rows])
        if dweight is not None:
            dweight.addmm_(logits.t(), x[rows])
        if dbias is not None:
            dbias += column_sum(logits, x.dtype)
        del logits
    if dweight is not None:
        dweight = dweight.to(weight_dtype)
    if dbias is not None:
        assert bias_dtype is not None
        dbias = dbias.to(bias_dtype)
    return dx, dweight, dbias
