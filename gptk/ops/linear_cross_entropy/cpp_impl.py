"""linear_cross_entropy: a chunk of rows at a time, torch's matrix product, then the C++ extension's
cross-entropy on the chunk's logits; in backward the logits become their own gradient in place.

Logits are float32 (float64 for float64) whatever the inputs' dtype. The chunk's buffer is the only
memory that depends on V, and it does not depend on the number of rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gptk.native import ACC
from gptk.ops.cpp_epilogue import sum_rows
from gptk.ops.cross_entropy.cpp_impl import forward as cross_entropy_forward
from gptk.ops.cross_entropy.cpp_impl import write_dlogits


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """Every shape and every dtype of the catalog runs."""
    return None


def chunk_rows(V: int) -> int:
    """Rows whose logits exist at once: 4M logits, but at least 256 rows, so that reading the weight
    once per chunk stays cheap beside the product."""
    return max(256, 2**22 // V)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), each (N,), for x (N, C), weight (V, C)."""
    N = x.shape[0]
    acc = ACC[x.dtype]
    loss = torch.empty(N, dtype=acc)
    lse = torch.empty(N, dtype=acc)
    for rows, logits, _ in _chunks(x, weight.to(acc), bias, acc):
        part = cross_entropy_forward(logits, target[rows], ignore_index, label_smoothing)
        if logits.shape[0] == N:
            return part
        loss[rows], lse[rows] = part
    return loss, lse


def backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias); the two sums over rows are kept in the accumulation dtype."""
    need_dx, need_dweight, need_dbias = needs
    acc = ACC[x.dtype]
    wide_weight = weight.to(acc)  # (V, C)
    dx = torch.empty(x.shape, dtype=acc) if need_dx else None
    dweight = torch.empty(weight.shape, dtype=acc) if need_dweight else None
    dbias = None
    first = True
    for rows, logits, x_rows in _chunks(x, wide_weight, bias, acc):
        dlogits = logits
        write_dlogits(
            dlogits, dloss[rows], logits, target[rows], lse[rows], ignore_index, label_smoothing
        )
        if dx is not None:
            torch.mm(dlogits, wide_weight, out=dx[rows])
        if dweight is not None:
            beta = 0 if first else 1
            torch.addmm(dweight, dlogits.t(), x_rows, beta=beta, out=dweight)
        if need_dbias:
            part = sum_rows(dlogits, acc)
            dbias = part if dbias is None else dbias.add_(part)
        first = False
    return (
        None if dx is None else dx.to(x.dtype),
        None if dweight is None else dweight.to(weight_dtype),
        None if dbias is None or bias_dtype is None else dbias.to(bias_dtype),
    )


def _chunks(
    x: Tensor, wide_weight: Tensor, bias: Tensor | None, acc: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their logits in one buffer used again and again, x of the rows), in order."""
    N, V = x.shape[0], wide_weight.shape[0]
    step = min(N, chunk_rows(V))
    buffer = torch.empty((step, V), dtype=acc)
    wide_bias = None if bias is None else bias.to(acc)
    for begin in range(0, N, step):
        rows = slice(begin, min(begin + step, N))
        x_rows = x[rows].to(acc)
        logits = buffer[: x_rows.shape[0]]
        if wide_bias is None:
            torch.mm(x_rows, wide_weight.t(), out=logits)
        else:
            torch.addmm(wide_bias, x_rows, wide_weight.t(), out=logits)
        yield rows, logits, x_rows
