"""Packed documents of attention: their offsets, checked, and who sees whom as ranges.

Document d holds queries cu_q[d] .. cu_q[d + 1] - 1 and keys cu_k[d] .. cu_k[d + 1] - 1. Documents,
causal alignment and window together are one rule: query i sees keys low[i] .. high[i] - 1. Both
ends never fall with i, so what a run of queries visits follows from its first and last one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptk.ops.tensors import addressable

Offsets = tuple[Tensor, Tensor]
"""(cu_q, cu_k), int64, (documents + 1,): each rises from 0 to its side's length."""


class Ranges(NamedTuple):
    """Query i sees keys key_low[i] .. key_high[i] - 1; key j is seen by queries query_low[j] ..
    query_high[j] - 1. int32, contiguous, inside the tensor, never falling."""

    key_low: Tensor  # (Tq,)
    key_high: Tensor  # (Tq,)
    query_low: Tensor  # (Tk,)
    query_high: Tensor  # (Tk,)


def offsets(query: Tensor, key: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Offsets | None:
    """The documents of query (1, H, Tq, D) and key (1, Hkv, Tk, D); None without cu_q and cu_k.

    Raises ValueError for what can be seen without waiting for a GPU, and while nothing traces.
    """
    if cu_q is None:
        if cu_k is not None:
            raise ValueError("cu_seqlens_k needs cu_seqlens_q")
        return None
    Tq, Tk = query.shape[2], key.shape[2]
    if query.shape[0] != 1:
        raise ValueError(f"query {tuple(query.shape)}: packed documents have a batch axis of 1")
    if cu_k is None and Tq != Tk:
        raise ValueError(f"cu_seqlens_q alone fits Tq == Tk, not {Tq} and {Tk}: give cu_seqlens_k")
    checked_q = _checked("cu_seqlens_q", cu_q, Tq, query.device)
    if cu_k is None:
        return checked_q, checked_q
    checked_k = _checked("cu_seqlens_k", cu_k, Tk, query.device)
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"cu_seqlens_q {tuple(cu_q.shape)}, cu_seqlens_k {tuple(cu_k.shape)}: they must fit"
        )
    return checked_q, checked_k


def _checked(name: str, cu: Tensor, T: int, device: torch.device) -> Tensor:
    if not isinstance(cu, Tensor):
        raise ValueError(f"{name} is a {type(cu).__name__}, it must be a tensor")
    if cu.dim() != 1 or cu.numel() < 2 or cu.dtype not in (torch.int32, torch.int64):
        shape = f"{tuple(cu.shape)} {cu.dtype}"
        raise ValueError(f"{name} {shape}: int32 or int64, one dimension, at least 2 entries")
    if cu.device != device:
        raise ValueError(f"{name} is on {cu.device}, query on {device}")
    if cu.device.type != "cpu" or not addressable(cu):
        return clamped(cu, T)
    cu = cu.to(torch.int64).contiguous()
    if cu[0] != 0 or cu[-1] != T or (cu.diff() < 0).any():
        raise ValueError(f"{name} must rise from 0 to {T}, it is {cu.tolist()}")
    return cu


def clamped(cu: Tensor, T: int) -> Tensor:
    """The nearest valid offsets, computed without a look at the values: those that are valid stay
    as they are, and no others make a kernel read out of bounds."""
    cu = cu.to(torch.int64).clamp(0, T).cummax(0).values
    cu[0], cu[-1] = 0, T
    return cu


def ranges(documents: Offsets, Tq: int, Tk: int, causal: bool, window: int | None) -> Ranges:
    """Who sees whom; everything stays on the offsets' device."""
    cu_q, cu_k = documents
    i = torch.arange(Tq, device=cu_q.device)
    d = torch.searchsorted(cu_q[1:], i, right=True)  # the document of each query
    key_low, key_high = cu_k[d], cu_k[d + 1]
    j = torch.arange(Tk, device=cu_q.device)
    e = torch.searchsorted(cu_k[1:], j, right=True)
    query_low, query_high = cu_q[e], cu_q[e + 1]
    if causal:
        last = i - cu_q[d + 1] + key_high  # the key that query i is aligned with
        first = j - cu_k[e + 1] + query_high  # the query that key j is aligned with
        if window is not None:
            key_low = torch.maximum(key_low, last + 1 - min(window, Tk))
            query_high = torch.minimum(query_high, first + min(window, Tk))
        key_high = torch.maximum(key_low, last + 1)
        query_low = torch.maximum(query_low, first)
        query_high = torch.maximum(query_high, query_low)
    found = (key_low, key_high, query_low, query_high)
    return Ranges(*(t.to(torch.int32) for t in found))
