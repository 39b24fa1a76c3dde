"""attention as a custom op (see gptk/ops/compiled.py)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gptk.ops.attention.ranges import Ranges
from gptk.ops.compiled import accumulation, custom_op, differentiable, needed
from gptk.ops.contract import implementation
from gptk.ops.tensors import readable


def last_dim_dense(t: Tensor) -> Tensor:
    """The tensor as the kernels read it by address: columns adjacent, other strides free."""
    return t if t.stride(-1) == 1 and not t.is_neg() else readable(t)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_low: Tensor | None,
    key_high: Tensor | None,
    query_low: Tensor | None,
    query_high: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(y (B, H, Tq, Dv) in (B, Tq, H, Dv) memory, lse (B, H, Tq)); seed: None without dropout."""
    q, k, v = (last_dim_dense(t) for t in (query, key, value))
    drawn = 0 if seed is None else seed
    impl = implementation("attention", backend)
    seen = _ranges(key_low, key_high, query_low, query_high)
    return impl.forward(q, k, v, causal, scale, dropout_p, drawn, window, seen)


def _ranges(*ends: Tensor | None) -> Ranges | None:
    """Who sees whom among packed documents (ranges.py); None: there are none."""
    return Ranges(*(readable(t) for t in ends if t is not None)) if ends[0] is not None else None


def attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_low: Tensor | None,
    key_high: Tensor | None,
    query_low: Tensor | None,
    query_high: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, H, Tq, _ = query.shape
    lse = query.new_empty(B, H, Tq, dtype=accumulation(query.dtype))
    return _heads_inside(query, value.shape[-1]), lse


def _heads_inside(t: Tensor, D: int) -> Tensor:
    """(B, H, T, D) in (B, T, H, D) memory."""
    B, H, T, _ = t.shape
    return t.new_empty(B, T, H, D).transpose(1, 2)


def attention_backward(
    dy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor,
    lse: Tensor,
    key_low: Tensor | None,
    key_high: Tensor | None,
    query_low: Tensor | None,
    query_high: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Those of dquery, dkey and dvalue that are needed."""
    dy, q, k, v, y = (last_dim_dense(t) for t in (dy, query, key, value, y))
    options = (causal, scale, dropout_p, 0 if seed is None else seed, window)
    impl = implementation("attention", backend)
    seen = _ranges(key_low, key_high, query_low, query_high)
    return needed(impl.backward(dy, q, k, v, y, readable(lse), *options, needs, ranges=seen))


def attention_backward_fake(
    dy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor,
    lse: Tensor,
    key_low: Tensor | None,
    key_high: Tensor | None,
    query_low: Tensor | None,
    query_high: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    return [
        _heads_inside(t, t.shape[-1])
        for t, need in zip((query, key, value), needs, strict=True)
        if need
    ]


def _given(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> Sequence[Any]:
    return *inputs[:3], *outputs, *inputs[3:]


op = differentiable(
    custom_op(attention, attention_fake),
    custom_op(attention_backward, attention_backward_fake),
    inputs=(0, 1, 2),
    given=_given,
)
