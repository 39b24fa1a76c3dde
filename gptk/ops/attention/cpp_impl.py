"""attention by the C++ extension (csrc/cpu/attention_*.cpp): addresses, strides and sizes."""

import torch
from torch import Tensor

from gptk.native import ACC, DTYPE, MASK64, alive, empty, load, threads
from gptk.ops.attention.ranges import Ranges


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """Every shape and every dtype of the catalog runs."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: int | Tensor,
    window: int | None,
    ranges: Ranges | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse): out (B, H, Tq, Dv) in (B, Tq, H, Dv) memory, lse (B, H, Tq).

    `ranges`, where given, say who sees whom in place of causal and window.
    """
    B, H, Tq, D = q.shape
    Hkv, Tk, Dv = v.shape[1:]
    dtype, extension, n_threads = q.dtype, load(), threads()
    strides = (Tq * H * Dv, Dv, H * Dv, 1)
    out = torch.empty_strided((B, H, Tq, Dv), strides, dtype=dtype, device="cpu")  # no view
    lse = empty((B, H, Tq), ACC[dtype])
    scratch = empty(n_threads * extension.attention_forward_scratch(Tq, D, Dv), ACC[dtype])
    extension.attention_forward(
        out.data_ptr(),
        lse.data_ptr(),
        scratch.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        *_addresses(ranges)[:2],
        B,
        H,
        Hkv,
        Tq,
        Tk,
        D,
        Dv,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        window or 0,
        scale,
        dropout_p,
        int(seed) & MASK64 if dropout_p else 0,
        causal,
        DTYPE[dtype],
        n_threads,
    )
    alive(q, k, v, scratch, *(ranges or ()))
    return out, lse


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
    """(dq, dk, dv): `into`, or each in (B, T, heads, columns) memory."""
    B, H, Tq, D = q.shape
    Hkv, Tk, Dv = v.shape[1:]
    dtype, extension, n_threads = q.dtype, load(), threads()
    if into is None:
        dq = empty((B, Tq, H, D), dtype).transpose(1, 2) if needs[0] else None
        dk = empty((B, Tk, Hkv, D), dtype).transpose(1, 2) if needs[1] else None
        dv = empty((B, Tk, Hkv, Dv), dtype).transpose(1, 2) if needs[2] else None
    else:
        dq, dk, dv = into
    size = extension.attention_backward_scratch(B, H, Hkv, Tq, Tk, D, Dv, n_threads)
    scratch = empty(size, ACC[dtype])
    extension.attention_backward(
        0 if dq is None else dq.data_ptr(),
        0 if dk is None else dk.data_ptr(),
        0 if dv is None else dv.data_ptr(),
        scratch.data_ptr(),
        dout.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        *_addresses(ranges),
        B,
        H,
        Hkv,
        Tq,
        Tk,
        D,
        Dv,
        *((0, 0, 0) if dq is None else dq.stride()[:3]),
        *((0, 0, 0) if dk is None else dk.stride()[:3]),
        *((0, 0, 0) if dv is None else dv.stride()[:3]),
        *dout.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        window or 0,
        scale,
        dropout_p,
        int(seed) & MASK64 if dropout_p else 0,
        causal,
        DTYPE[dtype],
        n_threads,
    )
    alive(dout, q, k, v, out, lse, scratch, *(ranges or ()))
    return dq, dk, dv


def _addresses(ranges: Ranges | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if ranges is None else tuple(t.data_ptr() for t in ranges)
