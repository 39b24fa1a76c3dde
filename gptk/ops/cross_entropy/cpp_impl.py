"""cross_entropy by the C++ extension (csrc/cpu/cross_entropy.cpp)."""

import torch
from torch import Tensor

from gptk.native import ACC, DTYPE, alive, empty, load, threads


def unsupported(
    device_type: str, dtype: torch.dtype, plain: bool = True, **traits: object
) -> str | None:
    """Every (N, V) and every dtype of the catalog runs."""
    if not plain:
        return "needs logits (N, V), class ids and no class weights"
    return None


def forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), each (N,), for logits (N, V) with adjacent columns."""
    N, V = logits.shape
    loss = empty(N, ACC[logits.dtype])
    lse = empty(N, ACC[logits.dtype])
    load().cross_entropy_forward(
        loss.data_ptr(),
        lse.data_ptr(),
        logits.data_ptr(),
        target.data_ptr(),
        N,
        V,
        logits.stride(0),
        ignore_index,
        label_smoothing,
        softcap or 0.0,
        z_loss,
        DTYPE[logits.dtype],
        threads(),
    )
    alive(logits, target)
    return loss, lse


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """dlogits (N, V), contiguous."""
    dlogits = empty(logits.shape, logits.dtype)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    write_dlogits(dlogits, dloss, logits, target, lse, *options)
    return dlogits


def write_dlogits(
    dlogits: Tensor,
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> None:
    """Write dlogits (N, V), rows apart by any stride. It may be the logits themselves, or 16-bit
    values at the front of each of their float32 rows."""
    N, V = logits.shape
    load().cross_entropy_backward(
        dlogits.data_ptr(),
        dloss.data_ptr(),
        logits.data_ptr(),
        target.data_ptr(),
        lse.data_ptr(),
        N,
        V,
        dlogits.stride(0),
        logits.stride(0),
        ignore_index,
        label_smoothing,
        softcap or 0.0,
        z_loss,
        DTYPE[dlogits.dtype],
        DTYPE[logits.dtype],
        threads(),
    )
    alive(dlogits, dloss, logits, target, lse)
