"""adamw by Triton: one launch updates every parameter of a group of equal dtypes, in place.

    p = p (1 - lr wd);  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)                as torch.optim.AdamW

A table of int64 rows, built once per call, holds addresses and sizes; a program looks up in it the
tensor that its block lies in, and sees from the addresses whether 128-bit accesses are possible, so
unaligned tensors need no launch of their own. Before the update one small launch advances every
step counter on the device and writes each parameter's coefficients in float64: 1 - 0.999^t formed
in float32 would be wrong by 6e-5 at t = 1. `skip` and the gradient multiplier (clipping, unscaling)
are read by the kernels, so nothing waits for the device; the host sends one small array from pinned
memory. The kernels write in place and are therefore never autotuned: trial runs would apply the
update several times.

Stochastic rounding of bfloat16 parameters: see gptk.random. A tensor's counters are its elements'
indices, and blocks begin at multiples of four, so a program draws four neighbours at a time.

Traffic of an update: g read, p, m, v (and the master) read and written, once. The table holds
addresses, so a call cannot be captured in a CUDA graph, and the interpreter takes CPU tensors only.
A step that clips takes five launches: the norm two, its factors, the coefficients, the update.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.adamw.triton_norm import factors, norm
from gptk.ops.adamw.triton_tables import (
    COLUMNS,
    Scalar,
    Scalars,
    addresses,
    aligned,
    find_row,
    launch_config,
    launches,
    send,
)
from gptk.ops.gelu.triton_impl import TL
from gptk.ops.philox_triton import philox_key, word_tile
from gptk.ops.triton_launch import ACC, INTERPRETED, launch, narrow, split_seed, why_not, widen

__all__ = ["factors", "norm", "unsupported", "update"]


@triton.jit
def _is_live(skip_ptr, HAS_SKIP: tl.constexpr):
    """False if the update is to be skipped; a NaN in skip counts as a reason to."""
    live = True
    if HAS_SKIP:
        live = widen(tl.load(skip_ptr), tl.float32) == 0.0
    return live


@triton.jit(do_not_specialize=["tensors"])
def _prepare_kernel(
    coefficients_ptr,  # (tensors, 4) float64: 1 - lr wd, lr / (1 - b1^t), 1 / (1 - b2^t), t
    table_ptr,  # (tensors, 3) int64: address of step, slot of lr, slot of weight decay
    values_ptr,  # float64: the distinct scalars of the call
    skip_ptr,  # (), read with HAS_SKIP
    tensors,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    HAS_SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tensors
    step_ptr = tl.load(table_ptr + 3 * i, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    lr = tl.load(values_ptr + tl.load(table_ptr + 3 * i + 1, mask=inside, other=0))
    decay = tl.load(values_ptr + tl.load(table_ptr + 3 * i + 2, mask=inside, other=0))
    step = tl.load(step_ptr, mask=inside, other=0.0) + 1.0
    t = step.to(tl.float64)
    tl.store(coefficients_ptr + 4 * i, 1.0 - lr * decay, mask=inside)
    tl.store(coefficients_ptr + 4 * i + 1, lr / (1.0 - tl.exp(t * log_beta1)), mask=inside)
    tl.store(coefficients_ptr + 4 * i + 2, 1.0 / (1.0 - tl.exp(t * log_beta2)), mask=inside)
    tl.store(coefficients_ptr + 4 * i + 3, t, mask=inside)
    if _is_live(skip_ptr, HAS_SKIP):
        tl.store(step_ptr, step, mask=inside)


@triton.jit
def _narrow_at_random(x, word):
    """x (float32) in bfloat16, up or down by the low 16 bits of `word`."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    nan = magnitude > 0x7F800000
    # from the largest finite value on, half an ulp: to nearest, and infinity stays itself
    added = tl.where(magnitude < 0x7F7F0000, word & 0xFFFF, 0x8000)
    kept = (tl.where(nan, 0, bits) + added) >> 16  # the sum must not wrap
    kept = tl.where(nan, (bits >> 16) | 0x40, kept)
    return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _update_block(
    grad_ptr,
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    master_ptr,
    at,
    inside,
    words,
    multiplier,
    keep,
    step_size,
    inverse,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ACC: tl.constexpr,
):
    """One block; keep = 1 - lr wd, inverse = 1 / (1 - b2^t), rest = 1 - beta, all in ACC; words:
    random ones, one for each element, used with STOCHASTIC."""
    g = widen(tl.load(grad_ptr + at, mask=inside), ACC) * multiplier
    m = widen(tl.load(exp_avg_ptr + at, mask=inside), ACC)
    v = widen(tl.load(exp_avg_sq_ptr + at, mask=inside), ACC)
    p = widen(tl.load(param_ptr + at, mask=inside), ACC)
    if HAS_MASTER:  # p is its rounding, or was changed since the last update
        master = widen(tl.load(master_ptr + at, mask=inside), ACC)
        rounded = widen(narrow(master, param_ptr.dtype.element_ty), ACC)
        p = tl.where(rounded == p, master, p)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    if ACC == tl.float64:
        root = tl.sqrt(v * inverse)
    else:
        root = tl.sqrt_rn(v * inverse)  # tl.sqrt flushes subnormals, which matters for eps = 0
    p = p * keep - step_size * m / (root + eps)
    tl.store(exp_avg_ptr + at, narrow(m, exp_avg_ptr.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq_ptr + at, narrow(v, exp_avg_sq_ptr.dtype.element_ty), mask=inside)
    if STOCHASTIC:
        tl.store(param_ptr + at, _narrow_at_random(p, words), mask=inside)
    else:
        tl.store(param_ptr + at, narrow(p, param_ptr.dtype.element_ty), mask=inside)
    if HAS_MASTER:
        tl.store(master_ptr + at, p, mask=inside)


@triton.jit(do_not_specialize=["tensors", "halvings", "seed_low", "seed_high"])
def _update_kernel(
    table_ptr,  # (tensors, COLUMNS) int64
    coefficients_ptr,  # (parameters, 4) float64
    multiplier_ptr,  # (): what to multiply each gradient by
    skip_ptr,  # (), read with HAS_SKIP
    tensors,
    halvings,
    seed_low,
    seed_high,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    if _is_live(skip_ptr, HAS_SKIP):
        row_ptr = find_row(table_ptr, block, tensors, halvings, COLUMNS)
        start = (block - tl.load(row_ptr)) * BLOCK
        n = tl.load(row_ptr + 1)
        at = start + tl.arange(0, BLOCK)
        grad = tl.load(row_ptr + 4)
        param = tl.load(row_ptr + 5)
        exp_avg = tl.load(row_ptr + 6)
        exp_avg_sq = tl.load(row_ptr + 7)
        master = tl.load(row_ptr + 8)
        own_ptr = coefficients_ptr + tl.load(row_ptr + 2) * 4
        keep = tl.load(own_ptr).to(ACC)
        step_size = tl.load(own_ptr + 1).to(ACC)
        inverse = tl.load(own_ptr + 2).to(ACC)
        multiplier = widen(tl.load(multiplier_ptr), ACC)
        # 1 - beta in float64: 1 - 0.999 in float32 is off by 1e-5
        b1, rest1 = tl.full((), beta1, tl.float64), tl.full((), 1.0 - beta1, tl.float64)
        b2, rest2 = tl.full((), beta2, tl.float64), tl.full((), 1.0 - beta2, tl.float64)
        small = tl.full((), eps, tl.float64).to(ACC)
        b1, rest1, b2, rest2 = b1.to(ACC), rest1.to(ACC), b2.to(ACC), rest2.to(ACC)
        words = 0
        if STOCHASTIC:
            key_low, key_high = philox_key(seed_low, seed_high)
            t = tl.load(own_ptr + 3).to(tl.int64).to(tl.uint32)
            row = tl.load(row_ptr + 3) + tl.zeros((1,), tl.int64)
            words = word_tile(key_low, key_high, row, start, t, BLOCK).reshape(BLOCK)
        wide = ((grad | param | exp_avg | exp_avg_sq | master) & 15) == 0
        if (start + BLOCK <= n) & wide:  # no mask, so wide accesses
            _update_block(
                aligned(grad, GRAD), aligned(param, PARAM), aligned(exp_avg, EXP_AVG),
                aligned(exp_avg_sq, EXP_AVG_SQ), aligned(master, tl.float32), at, None, words,
                multiplier, keep, step_size, inverse, b1, b2, rest1, rest2, small,
                HAS_MASTER, STOCHASTIC, ACC,
            )  # fmt: skip
        else:
            _update_block(
                grad.to(tl.pointer_type(GRAD)), param.to(tl.pointer_type(PARAM)),
                exp_avg.to(tl.pointer_type(EXP_AVG)), exp_avg_sq.to(tl.pointer_type(EXP_AVG_SQ)),
                master.to(tl.pointer_type(tl.float32)), at, at < n, words,
                multiplier, keep, step_size, inverse, b1, b2, rest1, rest2, small,
                HAS_MASTER, STOCHASTIC, ACC,
            )  # fmt: skip


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """None, or why this call cannot run."""
    if dtype not in TL:
        return f"dtype {dtype} (supported: {', '.join(map(str, TL))})"
    if INTERPRETED.value and device_type != "cpu":
        return "TRITON_INTERPRET=1: the interpreter cannot follow addresses on another device"
    return why_not(device_type)


def update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor | None],
    steps: list[Tensor],
    lr: Sequence[Scalar],
    weight_decay: Sequence[Scalar],
    beta1: float,
    beta2: float,
    eps: float,
    grad_multiplier: Scalar,
    skip: Tensor | None,
    rounding: tuple[int, Sequence[int]] | None = None,
) -> None:
    """One AdamW step, in place on params, exp_avgs, exp_avg_sqs, masters and steps.

    The lists run in parallel over the parameters, all on one device, contiguous. steps are 0-dim
    float32 and are advanced by one. If skip (0-dim) is not 0, nothing changes. rounding: (seed, row
    of each parameter) where bfloat16 without master is rounded stochastically.
    """
    if not params:
        return
    device, count = params[0].device, len(params)
    there = isinstance(grad_multiplier, Tensor) and grad_multiplier.device == device
    scalars = Scalars([] if there else [grad_multiplier], lr, weight_decay)
    prepare = np.array([addresses(steps), scalars.slots(lr), scalars.slots(weight_decay)], np.int64)
    seed, places = (0, None) if rounding is None else rounding
    low, high = split_seed(seed, device)
    tensors = (grads, params, exp_avgs, exp_avg_sqs)
    has_master = [master is not None for master in masters]
    work = launches(
        list(zip(*([t.dtype for t in ts] for ts in tensors), has_master, strict=True)),
        [p.numel() for p in params],
        [*map(addresses, tensors), [0 if m is None else m.data_ptr() for m in masters]],
        places,
    )
    *tables, prepared, sent = send(
        [*(each.table for each in work), prepare.T, scalars.array()], device
    )
    values = scalars.complete(sent)
    if not there:
        grad_multiplier = values.narrow(0, scalars.slots([grad_multiplier])[0], 1)
    coefficients = torch.empty((count, 4), dtype=torch.float64, device=device)
    log1, log2 = (math.log(b) if b > 0.0 else -math.inf for b in (beta1, beta2))
    launch(
        _prepare_kernel,
        (triton.cdiv(count, 128),),
        device,
        coefficients,
        prepared,
        values,
        skip,
        count,
        log1,
        log2,
        HAS_SKIP=skip is not None,
        BLOCK=128,
    )
    for (key, rows, blocks), table in zip(work, tables, strict=True):
        grad, param, exp_avg, exp_avg_sq, mastered = key
        launch(
            _update_kernel,
            (blocks,),
            device,
            table,
            coefficients,
            grad_multiplier,
            skip,
            len(rows),
            (len(rows) - 1).bit_length(),
            low,
            high,
            beta1,
            beta2,
            eps,
            GRAD=TL[grad],
            PARAM=TL[param],
            EXP_AVG=TL[exp_avg],
            EXP_AVG_SQ=TL[exp_avg_sq],
            HAS_MASTER=mastered,
            HAS_SKIP=skip is not None,
            STOCHASTIC=rounding is not None and param == torch.bfloat16 and not mastered,
            ACC=TL[ACC[param]],
            COLUMNS=COLUMNS,
            **launch_config(),
        )
