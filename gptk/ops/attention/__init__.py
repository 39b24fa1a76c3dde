"""attention: the contract, its checks and the one autograd.Function."""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gptk.ops.attention import compiled
from gptk.ops.attention.compiled import last_dim_dense
from gptk.ops.attention.ranges import Ranges, offsets, ranges
from gptk.ops.contract import backend_of, is_reference, resolve
from gptk.ops.tensors import (
    addressable,
    autocast_dtype,
    once_differentiable,
    outside_autocast,
    tracing,
)
from gptk.random import Seed, check_probability, draw_seed, seed_tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = dropout(softmax(scale * q k^T)) v over the keys that each query sees.

    Args:
        query: (B, H, Tq, D); key: (B, Hkv, Tk, D); value: (B, Hkv, Tk, Dv); any strides; one dtype.
        causal: query i sees keys 0 .. Tk - Tq + i (bottom-right, unlike torch's SDPA).
        scale: 1 / sqrt(D) by default (of no consequence for D = 0: every score is 0).
        dropout_p, seed: mask row (b * H + h) * Tq + i, column j; None draws a seed.
        enable_gqa: allow Hkv < H (H % Hkv == 0).
        window: with causal, query i sees its last `window` keys only.
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) int32 or int64, on the query's device: where
            the documents that are packed along Tq and Tk (B = 1) begin, from 0 to the length. A
            query sees its own document's keys, with causal and window aligned in the document; a
            document may be empty. cu_seqlens_k is cu_seqlens_q by default, where Tq = Tk. The mask
            of dropout counts packed rows and columns. On a GPU the values are not checked, which
            would wait for it: wrong ones are clamped to rise from 0 to the length.
        backend: auto, torch, triton or cpp.

    Returns: (B, H, Tq, Dv); rows without keys are 0 and have gradient 0.
    Raises: ValueError for shapes, dtypes or devices that do not fit. Unsupported: the named
        backend cannot run this.
    Memory: the kernels never store the Tq x Tk matrix (the torch definition does).
    Reference: Dao 2023, https://arxiv.org/abs/2307.08691.
    """
    _check(query, key, value, causal, window, enable_gqa)
    documents = offsets(query, key, cu_seqlens_q, cu_seqlens_k)
    cast = autocast_dtype(query)
    if check_probability(dropout_p) and seed is None:
        seed = draw_seed()
    seed = 0 if seed is None else seed
    scale = 1.0 / math.sqrt(query.shape[-1] or 1) if scale is None else float(scale)
    if cast is not None:
        query, key, value = query.to(cast), key.to(cast), value.to(cast)
    impl = resolve("attention", backend, query, D=_width(query), Dv=_width(value))
    if is_reference(impl) or 0 in (query.numel(), key.numel(), value.numel()):
        from gptk.ops.attention.reference import attention as definition

        return definition(query, key, value, causal, scale, dropout_p, seed, window, documents)
    seen = None
    if documents is not None:
        seen = ranges(documents, query.shape[2], key.shape[2], causal, window)
    if not addressable(query, key, value):
        drawn = seed_tensor(seed) if dropout_p else None
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        who = (None,) * 4 if seen is None else seen
        options = (*who, causal, scale, float(dropout_p), drawn, window, backend_of(impl))
        return compiled.op(q, k, v, *options)[0]
    options = (causal, scale, dropout_p, seed, window)
    return AttentionFunction.apply(impl, query, key, value, seen, *options)


def _width(t: Tensor) -> int:
    """The head size; of a traced program, where it may be a symbol, a size in its place that the
    kernels take or refuse alike."""
    D = t.shape[-1]
    return D if isinstance(D, int) and not tracing() else 1 if D <= 256 else 257


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, enable_gqa: bool
) -> None:
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"{_shapes(q, k, v)}: each must be (B, H, T, D)")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{_shapes(q, k, v)} do not fit together")
    if q.shape[1] != k.shape[1] and (not enable_gqa or not k.shape[1] or q.shape[1] % k.shape[1]):
        heads = f"{q.shape[1]} query heads for {k.shape[1]} key heads"
        raise ValueError(f"{_shapes(q, k, v)}: {heads}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype} or devices differ")
    if isinstance(window, bool) or not (window is None or isinstance(window, int | torch.SymInt)):
        raise ValueError(f"window={window!r} must be a whole number of keys, or None")
    if window is not None and (not causal or window < 1):
        raise ValueError(f"window={window} needs causal=True and at least 1")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"


class AttentionFunction(torch.autograd.Function):
    """Saves q, k, v, the output, the log-sum-exp of each row and, of documents, the ranges."""

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any,
        impl: ModuleType,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Ranges | None,
        *options: Any,
    ) -> Tensor:
        q, k, v = last_dim_dense(q), last_dim_dense(k), last_dim_dense(v)
        out, lse = impl.forward(q, k, v, *options, seen)
        ctx.save_for_backward(q, k, v, out, lse, *(seen or ()))
        ctx.impl, ctx.options = impl, options
        return out

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dout: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:4]
        q, k, v, out, lse, *seen = ctx.saved_tensors
        grads = ctx.impl.backward(
            last_dim_dense(dout), q, k, v, out, lse, *ctx.options, needs,
            ranges=Ranges(*seen) if seen else None,
        )  # fmt: skip
        return None, *grads, None, None, None, None, None, None
