"""adamw by the C++ extension (csrc/cpu/adamw.cpp): one call for all parameters."""

from array import array
from collections.abc import Sequence
from struct import Struct

import torch
from torch import Tensor

from gptk.native import DTYPE, MASK64, empty, load, threads
from gptk.ops.adamw.reference import factors

__all__ = ["factors", "norm", "unsupported", "update"]

# struct gptk_adamw_tensor: param, exp_avg, exp_avg_sq, master, step, grad, numel, row, lr,
# weight_decay, param_dtype, state_dtype, grad_dtype, stochastic
_pack = Struct("6QqQ2d4i").pack


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """Every shape and every dtype of the catalog runs."""
    return None


def norm(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, 0-dim float64."""
    rows = [
        _pack(0, 0, 0, 0, 0, g.data_ptr(), g.numel(), 0, 0.0, 0.0, 0, 0, DTYPE[g.dtype], 0)
        for g in grads
    ]
    extension = load()
    block = extension.NORM_BLOCK
    pieces = sum(-(-g.numel() // block) for g in grads)
    total = empty((), torch.float64)
    partial = empty(pieces, torch.float64)
    table = array("B", b"".join(rows))
    extension.adamw_norm(
        total.data_ptr(), partial.data_ptr(), table.buffer_info()[0], len(rows), threads()
    )
    return total


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    grad_multiplier: float | Tensor,
    skip: Tensor | None,
    rounding: tuple[int, Sequence[int]] | None = None,
) -> None:
    """Update params, exp_avgs, exp_avg_sqs, masters and steps in place, unless `skip`.

    rounding: (seed, row of each parameter) where bfloat16 without master is rounded stochastically.
    """
    if skip is not None and bool(skip):
        return
    seed, places = rounding or (0, [0] * len(params))
    rows = [
        _pack(
            p.data_ptr(),
            m.data_ptr(),
            v.data_ptr(),
            0 if master is None else master.data_ptr(),
            step.data_ptr(),
            g.data_ptr(),
            p.numel(),
            place,
            float(rate),
            float(decay),
            DTYPE[p.dtype],
            DTYPE[m.dtype],
            DTYPE[g.dtype],
            rounding is not None and master is None and p.dtype == torch.bfloat16,
        )
        for p, g, m, v, master, step, rate, decay, place in zip(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            masters,
            steps,
            lr,
            weight_decay,
            places,
            strict=True,
        )
    ]
    table = array("B", b"".join(rows))
    load().adamw_update(
        table.buffer_info()[0],
        len(rows),
        float(beta1),
        float(beta2),
        float(eps),
        float(grad_multiplier),
        seed & MASK64,
        threads(),
    )
