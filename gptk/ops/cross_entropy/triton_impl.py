"""cross_entropy by Triton: one program per row, the vocabulary in blocks, so any V runs.

With s = label smoothing and z the row, loss = lse - (1 - s) z[t] - s / V sum(z). It is computed as

    loss = log(sum exp(z - m)) + (m - z[t]) - s / V sum(z - z[t]),     m = max(z)

which stays exact to float32 for logits of +-1e4: no large numbers are subtracted after rounding.
Milakov and Gimelshein 2018 (https://arxiv.org/abs/1805.02867): m and the sum in one sweep, the
sum rescaled when m grows. A block of -inf only leaves both unchanged.

    dlogits = dloss (p - (1 - s) [j = t] - s / V), subtracted in float32, rounded once

With z_loss the loss gains z_loss lse^2, and the bracket 2 z_loss lse p. With softcap
z = softcap tanh(logits / softcap), formed again in every sweep, and dlogits is also multiplied by
1 - (z / softcap)^2.

p = exp(z - lse) has a relative error of |lse| 2^-24: below the rounding of 16-bit gradients, but
not of wider ones, so for those backward sweeps the row again for m and the sum (mostly from L2).

Traffic: forward reads logits once; backward reads them once (16 bit) or twice and writes dlogits.
dlogits may be the logits themselves: every element is read before it is written, by its own row.
A target outside [0, V) other than ignore_index gives NaN and no access outside the row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.gelu.triton_impl import TL
from gptk.ops.triton_launch import ACC, architecture, launch, narrow, why_not, widen
from gptk.ops.tuning import user_row


def unsupported(
    device_type: str, dtype: torch.dtype, plain: bool = True, **traits: object
) -> str | None:
    """None, or why this call cannot run; every (N, V) of the four dtypes can."""
    if not plain:
        return "needs logits (N, V), class ids and no class weights"
    return why_not(device_type)


def launch_config(V: int, has_softcap: bool = False) -> dict[str, int]:
    """Columns per step and warps for rows of V; a softcap takes registers."""
    block_v = min(2048 if has_softcap else 4096, max(32, triton.next_power_of_2(V)))
    return {"BLOCK_V": block_v, "num_warps": 4 if block_v <= 1024 else 8}


def _config(kernel: str, logits: Tensor, softcap: float | None) -> dict[str, int]:
    """The user's configuration, or the one that ships."""
    V = logits.shape[1]
    kind = "plain" if softcap is None else "softcap"
    own = user_row(kernel, architecture(logits.device), 8 * logits.element_size(), V, kind)
    if own is None:
        return launch_config(V, softcap is not None)
    return {"BLOCK_V": own[0], "num_warps": own[1]}


@triton.jit
def _load_logits(row_ptr, bias_ptr, columns, V, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """row[columns] + bias[columns], -inf past V."""
    z = widen(tl.load(row_ptr + columns, mask=columns < V, other=-float("inf")), ACC)
    if HAS_BIAS:
        z += widen(tl.load(bias_ptr + columns, mask=columns < V, other=0.0), ACC)
    return z


@triton.jit
def tanh_and_slope(x):
    """(tanh(x), 1 - tanh(x)^2), x float32 or float64: no overflow, and neither by cancellation.

    With e = exp(-2 |x|), tanh |x| = 1 - 2 e / (1 + e) and the slope is 4 e / (1 + e)^2. Below 0.6,
    where the former cancels, tanh x is x less what Lambert's continued fraction
    x / (1 + x^2 / (3 + x^2 / (5 + ...))), down to its 15, falls short of it.
    """
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    inverse = 1.0 / (1.0 + e)
    small = tl.where(size < 0.6, size, 0.0)
    s = small * small
    top = s * (675675.0 + s * (45045.0 + s * (594.0 + s)))
    bottom = 2027025.0 + s * (945945.0 + s * (51975.0 + s * (630.0 + s)))
    y = tl.where(size < 0.6, small - small * (top / bottom), 1.0 - 2.0 * (e * inverse))
    return tl.where(x < 0.0, -y, y), 4.0 * ((e * inverse) * inverse)


@triton.jit
def capped(logits, softcap, ACC: tl.constexpr):
    """(softcap tanh(logits / softcap), its slope)."""
    cap = tl.full((), softcap, tl.float64)
    y, slope = tanh_and_slope(logits * (1.0 / cap).to(ACC))
    return y * cap.to(ACC), slope


@triton.jit
def _sweep(
    row_ptr,
    bias_ptr,
    pivot,
    V,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """(m, sum exp(z - m), sum(z - pivot) with HAS_SMOOTHING) of one row."""
    m = tl.full((), -float("inf"), ACC)
    total = tl.full((), 0.0, ACC)
    spread = tl.full((), 0.0, ACC)
    for first in range(0, V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        z = _load_logits(row_ptr, bias_ptr, columns, V, HAS_BIAS, ACC)
        if HAS_SOFTCAP:
            z, _ = capped(z, softcap, ACC)
            z = tl.where(columns < V, z, -float("inf"))
        grown = tl.maximum(m, tl.max(z, 0))
        shift = tl.where(grown == -float("inf"), 0.0, grown)  # -inf - -inf would be NaN
        total = total * tl.exp(m - shift) + tl.sum(tl.exp(z - shift), 0)
        if HAS_SMOOTHING:
            spread += tl.sum(tl.where(columns < V, z - pivot, 0.0), 0)
        m = grown
    return m, total, spread


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_forward_kernel(
    loss_ptr,  # (N,) accumulation dtype
    lse_ptr,  # (N,) accumulation dtype
    logits_ptr,  # (N, V)
    bias_ptr,  # (V,), read with HAS_BIAS
    target_ptr,  # (N,) int64
    V,
    stride_logits,
    ignore_index,
    off_weight: tl.float64,  # s / V
    softcap: tl.float64,  # read with HAS_SOFTCAP
    z_loss: tl.float64,  # read with HAS_Z_LOSS
    HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    target = tl.load(target_ptr + row)
    valid = (target >= 0) & (target < V)
    z_target = widen(tl.load(row_ptr + target, mask=valid, other=0.0), ACC)
    if HAS_BIAS:
        z_target += widen(tl.load(bias_ptr + target, mask=valid, other=0.0), ACC)
    if HAS_SOFTCAP:
        z_target, _ = capped(z_target, softcap, ACC)
    z_target = tl.where(valid, z_target, float("nan"))
    pivot = tl.where(z_target == -float("inf"), 0.0, z_target)  # then the loss is inf anyway
    m, total, spread = _sweep(
        row_ptr, bias_ptr, pivot, V, softcap, HAS_BIAS, HAS_SMOOTHING, HAS_SOFTCAP, ACC, BLOCK_V
    )
    log_total = tl.log(total)
    loss = log_total + (m - z_target)
    if HAS_SMOOTHING:
        loss -= tl.full((), off_weight, tl.float64).to(ACC) * spread
    lse = m + log_total
    if HAS_Z_LOSS:
        loss += tl.full((), z_loss, tl.float64).to(ACC) * lse * lse
    tl.store(loss_ptr + row, tl.where(target == ignore_index, 0.0, loss))
    tl.store(lse_ptr + row, lse)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_backward_kernel(
    dlogits_ptr,  # (N, V) contiguous; may be logits_ptr
    dloss_ptr,  # (N,) accumulation dtype
    logits_ptr,  # (N, V)
    bias_ptr,  # (V,), read with HAS_BIAS
    target_ptr,  # (N,) int64
    lse_ptr,  # (N,) accumulation dtype, read without RESWEEP or with HAS_Z_LOSS
    V,
    stride_logits,
    ignore_index,
    on_weight: tl.float64,  # 1 - s
    off_weight: tl.float64,  # s / V
    softcap: tl.float64,  # read with HAS_SOFTCAP
    z_loss: tl.float64,  # read with HAS_Z_LOSS
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    RESWEEP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    dloss = tl.load(dloss_ptr + row)
    dloss = tl.where((target >= 0) & (target < V), dloss, float("nan"))
    on = tl.full((), on_weight, tl.float64).to(ACC)
    off = tl.full((), off_weight, tl.float64).to(ACC)
    if RESWEEP:
        m, total, _ = _sweep(
            row_ptr, bias_ptr, 0.0, V, softcap, HAS_BIAS, False, HAS_SOFTCAP, ACC, BLOCK_V
        )
        shift = tl.where(m == -float("inf"), 0.0, m)
        scale = 1.0 / total
    else:
        shift = tl.load(lse_ptr + row)
        scale = tl.full((), 1.0, ACC)
    if HAS_Z_LOSS:  # d (z_loss lse^2) / d lse
        z_slope = 2.0 * tl.full((), z_loss, tl.float64).to(ACC) * tl.load(lse_ptr + row)
    for first in range(0, V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        z = _load_logits(row_ptr, bias_ptr, columns, V, HAS_BIAS, ACC)
        if HAS_SOFTCAP:
            z, slope = capped(z, softcap, ACC)
        p = tl.exp(z - shift) * scale
        dz = (p - tl.where(columns == target, on, 0.0)) - off
        if HAS_Z_LOSS:
            dz += z_slope * p
        if HAS_SOFTCAP:
            dz *= slope
        dz = dloss * dz
        dz = narrow(tl.where(ignored, 0.0, dz), dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_ptr + row * V + columns, dz, mask=columns < V)


def losses(
    loss: Tensor,
    lse: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
) -> None:
    """Write loss and lse (N,) for logits (N, V), to which bias (V,) is added if given."""
    N, V = logits.shape
    launch(
        _cross_entropy_forward_kernel,
        (N,),
        logits.device,
        loss,
        lse,
        logits,
        bias,
        target,
        V,
        logits.stride(0),
        ignore_index,
        label_smoothing / V,
        float(softcap or 0.0),
        float(z_loss),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_Z_LOSS=z_loss != 0.0,
        HAS_SMOOTHING=label_smoothing != 0.0,
        ACC=TL[ACC[logits.dtype]],
        **_config("cross_entropy.forward", logits, softcap),
    )


def logit_gradients(
    dlogits: Tensor,
    dloss: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
) -> None:
    """Write dlogits (N, V), contiguous, of any float dtype; it may be logits itself."""
    N, V = logits.shape
    launch(
        _cross_entropy_backward_kernel,
        (N,),
        logits.device,
        dlogits,
        dloss,
        logits,
        bias,
        target,
        lse,
        V,
        logits.stride(0),
        ignore_index,
        1.0 - label_smoothing,
        label_smoothing / V,
        float(softcap or 0.0),
        float(z_loss),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_Z_LOSS=z_loss != 0.0,
        RESWEEP=dlogits.dtype == ACC[dlogits.dtype],
        ACC=TL[ACC[logits.dtype]],
        **_config("cross_entropy.backward", logits, softcap),
    )


def forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), both (N,) in the accumulation dtype; the row stride of logits is free."""
    loss = logits.new_empty(logits.shape[0], dtype=ACC[logits.dtype])
    lse = torch.empty_like(loss)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    losses(loss, lse, logits, None, target, *options)
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
    """dlogits (N, V), contiguous, in the dtype of logits; exactly 0 in ignored rows."""
    dlogits = logits.new_empty(logits.shape)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    logit_gradients(dlogits, dloss, logits, None, target, lse, *options)
    return dlogits
