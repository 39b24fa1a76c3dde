"""Attention: the definition, and the torch backend."""

import torch
from torch import Tensor

from gptk.random import Seed, dropout


def keep(
    Tq: int,
    Tk: int,
    causal: bool,
    window: int | None,
    device: torch.device,
    documents: tuple[Tensor, Tensor] | None = None,  # their offsets on either side
) -> Tensor:
    """(Tq, Tk) bool: which key each query sees; causal is aligned bottom-right in a document."""
    i = torch.arange(Tq, device=device)[:, None]
    j = torch.arange(Tk, device=device)[None, :]
    last = i + (Tk - Tq)  # the key that query i is aligned with
    seen = torch.ones_like(j <= i)
    if documents is not None:
        cu_q, cu_k = documents
        d, e = (torch.searchsorted(cu[1:], t, right=True) for cu, t in ((cu_q, i), (cu_k, j)))
        last = i - cu_q[d + 1] + cu_k[d + 1]
        seen = d == e
    seen = seen & (j <= last) if causal else seen
    return seen if window is None else seen & (j > last - window)


def attention(
    query: Tensor,  # (B, H, Tq, D)
    key: Tensor,  # (B, Hkv, Tk, D)
    value: Tensor,  # (B, Hkv, Tk, Dv)
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Seed = 0,
    window: int | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v, Vaswani et al. 2017, https://arxiv.org/abs/1706.03762."""
    groups = query.shape[1] // max(key.shape[1], 1)
    key, value = (t.repeat_interleave(groups, 1) if groups != 1 else t for t in (key, value))
    seen = keep(query.shape[2], key.shape[2], causal, window, query.device, documents)
    # a non-finite key or value is set to 0, and the rows that see it, no others, are NaN (where it
    # is infinite, a kernel may leave what its products are)
    bad_key, bad_value = ~key.isfinite().all(-1), ~value.isfinite()
    key, value = key.masked_fill(bad_key[..., None], 0.0), value.masked_fill(bad_value, 0.0)
    scores = (query @ key.mT) * scale  # (B, H, Tq, Tk)
    scores = scores.masked_fill(bad_key[..., None, :], torch.nan).masked_fill(~seen, -torch.inf)
    p = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), -1)
    p = p.masked_fill(~seen.any(-1, keepdim=True), 0.0)  # a row that sees no key gives 0
    y = dropout(p, dropout_p, seed).to(value.dtype) @ value
    reached = seen.to(value.dtype) @ bad_value.to(value.dtype) > 0
    return y.masked_fill(reached, torch.nan)
