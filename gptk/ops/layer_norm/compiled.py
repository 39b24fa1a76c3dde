"""layer_norm as a custom op (see gptk/ops/compiled.py). h is empty without a residual."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptk.ops.compiled import (
    accumulation,
    custom_op,
    differentiable,
    dtype_of,
    needed,
    nothing,
    spread,
)
from gptk.ops.contract import implementation
from gptk.ops.tensors import readable


def gradient_weight(
    weight: Tensor | None, bias_dtype: torch.dtype | None, like: Tensor
) -> Tensor | None:
    """The weight (N,) as backward is given it. Both gradients come in its dtype, the wider of the
    two; without a weight that of `like` (..., N)."""
    dtype = (like if weight is None else weight).dtype
    if bias_dtype is None or bias_dtype.itemsize <= dtype.itemsize:
        return weight
    if weight is None:
        return like.new_ones(like.shape[-1], dtype=bias_dtype)
    return weight.to(bias_dtype)


def layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean (M,), rstd (M,)), over the last `dims` dimensions; seed: None without dropout."""
    N = math.prod(input.shape[-dims:])
    x = readable(input.reshape(-1, N))
    r = None if residual is None else readable(residual.reshape(-1, N))
    w, b = (None if p is None else readable(p.reshape(N)) for p in (weight, bias))
    impl = implementation("layer_norm", backend)
    drawn = 0 if seed is None else seed
    y, h, mean, rstd = impl.forward(x, w, b, eps, r, dropout_p, drawn)
    h = nothing(y) if h is None else h.view(input.shape)
    return y.view(input.shape), h, mean, rstd


def layer_norm_fake(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = input.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    y = input.new_empty(input.shape, dtype=dtype)
    mean = y.new_empty(math.prod(input.shape[:-dims]), dtype=accumulation(dtype))
    h = nothing(y) if residual is None else torch.empty_like(y)
    return y, h, mean, torch.empty_like(mean)


def layer_norm_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dims: int,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Those of dinput, dresidual, dweight and dbias that are needed; h: the rows normalised."""
    shape, tail = h.shape, h.shape[-dims:]
    rows = readable(h.reshape(-1, math.prod(tail)))
    dy, dh = (None if t is None else readable(t.reshape(rows.shape)) for t in (dy, dh))
    dy = torch.zeros_like(rows) if dy is None else dy
    w = None if weight is None else readable(weight.reshape(-1))
    w = gradient_weight(w, bias_dtype, rows)
    dtypes, drawn = (input_dtype, residual_dtype), 0 if seed is None else seed
    dx, dr, dw, db = implementation("layer_norm", backend).backward(
        dy, dh, rows, w, readable(mean), readable(rstd), *dtypes, dropout_p, drawn, tuple(needs)
    )
    return needed(
        [
            None if dx is None else dx.view(shape),
            None if dr is None else dr.view(shape),
            None if dw is None or weight is None else dw.view(tail).to(weight.dtype),
            None if db is None else db.view(tail).to(bias_dtype),
        ]
    )


def layer_norm_backward_fake(
    dy: Tensor | None,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dims: int,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    tail = h.shape[-dims:]
    return needed(
        [
            h.new_empty(h.shape, dtype=input_dtype) if needs[0] else None,
            h.new_empty(h.shape, dtype=residual_dtype) if needs[1] else None,
            h.new_empty(tail, dtype=dtype_of(weight)) if needs[2] else None,
            h.new_empty(tail, dtype=bias_dtype) if needs[3] else None,
        ]
    )


def _given(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> Sequence[Any]:
    input, residual, weight, bias, dims, eps, dropout_p, seed, backend = inputs
    _, h, mean, rstd = outputs
    dtypes = (input.dtype, dtype_of(residual), dtype_of(bias))
    rows = input if residual is None else h
    return rows, weight, mean, rstd, dims, *dtypes, dropout_p, seed, backend


def _gradients(
    upstream: Sequence[Tensor | None], given: Sequence[Any], needs: list[bool]
) -> Sequence[Tensor | None]:
    """Where dinput and dresidual have one value they are one tensor, and that is found once."""
    dy, dh = upstream
    used = dy is not None
    needs = [*needs[:2], used and needs[2], used and needs[3]]
    input_dtype, residual_dtype, dropout_p = given[5], given[6], given[8]
    dh = None if residual_dtype is None else dh
    same = all(needs[:2]) and dropout_p == 0.0 and input_dtype == residual_dtype
    asked = [needs[0] and not same, *needs[1:]]
    found = spread(backward(dy, dh, *given, asked), asked)
    return [found[1], *found[1:]] if same else found


backward = custom_op(layer_norm_backward, layer_norm_backward_fake)
op = differentiable(
    custom_op(layer_norm, layer_norm_fake),
    backward,
    inputs=(0, 1, 2, 3),
    given=_given,
    results=2,
    gradients=_gradients,
)
