"""The backward of attention in Triton, without atomics: delta, then dq, then dk and dv.

With p = exp(q k^T scale - lse), delta = rowsum(dout out), ds = p (dout v^T - delta):
dq = ds k scale, dk = ds^T q scale, dv = p^T dout. The dq kernel owns queries and runs over keys;
the dk/dv kernel owns keys and runs over the queries of every head that shares them. Both form p
again, so nothing of size Tq x Tk is stored and every sum has a fixed order.
"""

import torch
import triton
from torch import Tensor

from gptk.ops.attention import triton_dkdv, triton_dq
from gptk.ops.attention.ranges import Ranges
from gptk.ops.attention.triton_dkdv import attention_dkdv_kernel
from gptk.ops.attention.triton_dq import attention_delta_kernel, attention_dq_kernel
from gptk.ops.attention.triton_tiles import kind_of, range_arguments
from gptk.ops.triton_launch import architecture, dropout_arguments, launch, options, split_seed


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: int | Tensor,
    window: int | None,
    needs: tuple[bool, bool, bool],
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    ranges: Ranges | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv) in the shapes and dtypes of q, k, v; None where `needs` says False. They are
    `into`, if it is given (any strides, columns adjacent). `ranges`, where given, say who sees
    whom in place of causal and window."""
    B, H, Tq, D = q.shape
    Hkv, Tk, DV = v.shape[1:]
    asked = (max(D, DV), q.dtype, kind_of(dropout_p, ranges), architecture(q.device))
    block_dv = max(16, triton.next_power_of_2(DV))
    delta = torch.empty_like(lse)
    launch(
        attention_delta_kernel,
        (triton.cdiv(Tq, 16) * B * H,),
        q.device,
        delta,
        out,
        dout,
        out.stride()[:3],
        dout.stride()[:3],
        H,
        Tq,
        DV=DV,
        BLOCK_Q=16,
        BLOCK_DV=block_dv,
    )
    scalars = (
        H,
        Tq,
        Tk,
        0 if window is None else min(window, Tk),
        scale,
        *split_seed(seed if dropout_p else 0, q.device),
        *dropout_arguments(dropout_p),
    )
    meta = {
        "GROUP": H // Hkv,
        "D": D,
        "DV": DV,
        "CAUSAL": causal and ranges is None,
        "HAS_WINDOW": window is not None and ranges is None,
        "HAS_RANGES": ranges is not None,
        "HAS_DROPOUT": dropout_p > 0.0,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_DV": block_dv,
    }
    limits = range_arguments(ranges, q.dtype)
    dq = dk = dv = None
    if needs[0]:
        block_q, block_k, *pipeline = triton_dq.launch_config(*asked)
        dq = _empty_like(q) if into is None else into[0]
        arguments = (dq, dout, q, k, v, lse, delta)
        launch(
            attention_dq_kernel,
            (triton.cdiv(Tq, block_q) * B * H,),
            q.device,
            *arguments,
            *limits[:2],
            *(t.stride()[:3] for t in arguments[:5]),
            *scalars,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            **options(*pipeline),
            **meta,
        )
    if needs[1] or needs[2]:
        block_q, block_k, *pipeline = triton_dkdv.launch_config(*asked)
        dk, dv = (_empty_like(k), _empty_like(v)) if into is None else into[1:]
        pointers = (dk, dv, dout, q, k, v, lse, delta)
        launch(
            attention_dkdv_kernel,
            (triton.cdiv(Tk, block_k) * B * Hkv,),
            q.device,
            *pointers,
            *limits[2:],
            *(t.stride()[:3] for t in pointers[:6]),
            *scalars,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            **options(*pipeline),
            **meta,
        )
    return dq, dk if needs[1] else None, dv if needs[2] else None


def _empty_like(x: Tensor) -> Tensor:
    """New memory for a (B, H, T, D) tensor, laid out as (B, T, H, D)."""
    B, H, T, D = x.shape
    return torch.empty((B, T, H, D), dtype=x.dtype, device=x.device).transpose(1, 2)
