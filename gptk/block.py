"""A transformer block as one autograd node: the kernels of its ops called in a row.

    h1 = x + dropout(branch)         y1 = layer_norm(h1)
    q, k, v = linear(y1)             a = attention(q, k, v)          p = linear(a)
    h2 = h1 + dropout(p)             y2 = layer_norm(h2)             out = mlp(y2)

The values and gradients are those of the ops one by one, bit for bit: the same implementations get
the same arguments. What is saved is what lies between them: six autograd nodes, their argument
checks, views and casts, which cost more than the arithmetic in a small model.
"""

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptk.ops.tensors import once_differentiable, outside_autocast, parameter, readable

OPS = ("layer_norm", "linear", "attention", "mlp")


Cache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the new keys and values (B, H, T, D), gives all of them so far."""


@functools.cache
def parameter_sizes(C: int, hidden: int) -> tuple[tuple[int, ...], ...]:
    """Of w1 b1 w_qkv b_qkv w_o b_o w2 b2 w_fc b_fc w_p b_p."""
    sizes: list[tuple[int, ...]] = []
    for size in ((C,), (3 * C, C), (C, C), (C,), (hidden, C), (C, hidden)):
        sizes += [size, size[:1]]
    return tuple(sizes)


class Plan(NamedTuple):
    """What a block computes besides its tensors."""

    kernels: tuple[ModuleType, ...]  # of OPS
    n_head: int
    dropout_p: float
    seeds: tuple[Any, Any, Any]  # of the branch, the attention, the attention's projection
    eps: tuple[float, float]
    activation: str | None
    cast: torch.dtype | None  # autocast's


class Made(NamedTuple):
    """A block's results, (B T, C), and what its backward needs."""

    out: Tensor
    h2: Tensor
    saved: tuple[Tensor | None, ...]
    weights: tuple[Tensor | None, ...]
    options: tuple[Any, ...]  # of the attention
    projected_dtype: torch.dtype


def run(
    plan: Plan,
    branch: Tensor | None,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    cache: Cache | None = None,
) -> Made:
    """The block's kernels, one after the other; with a cache, after the tokens that it holds."""
    norm, linear, attention, mlp = plan.kernels
    B, T, C = x.shape
    M, H, p = B * T, plan.n_head, plan.dropout_p
    w1, b1, w_qkv, b_qkv, w_o, b_o, w2, b2, w_fc, b_fc, w_p, b_p = parameters
    c_qkv, cb_qkv, c_o, cb_o = (
        None if t is None else parameter(linear, t, plan.cast) for t in (w_qkv, b_qkv, w_o, b_o)
    )
    c_fc, cb_fc, c_p, cb_p = (
        None if t is None else parameter(mlp, t, plan.cast) for t in (w_fc, b_fc, w_p, b_p)
    )
    w1, b1, w2, b2 = (None if t is None else readable(t) for t in (w1, b1, w2, b2))
    x2 = readable(x.reshape(M, C))
    if branch is None:
        y1, _, mean1, rstd1 = norm.forward(x2, w1, b1, plan.eps[0], None, 0.0, 0, plan.cast)
        h1 = x2
    else:
        branch2 = readable(branch.reshape(M, C))
        y1, h1, mean1, rstd1 = norm.forward(
            branch2, w1, b1, plan.eps[0], x2, p, plan.seeds[0], plan.cast
        )
    qkv, _ = linear.forward(y1, c_qkv, cb_qkv, None)
    q, k, v = qkv.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
    if cache is not None:
        k, v = cache(k, v)
    options = (True, 1.0 / math.sqrt(C // H), p, plan.seeds[1], None)
    a, lse = attention.forward(q, k, v, *options)  # (B, H, T, D)
    a2 = a.transpose(1, 2).reshape(M, C)
    projected, _ = linear.forward(a2, c_o, cb_o, None)
    y2, h2, mean2, rstd2 = norm.forward(
        projected, w2, b2, plan.eps[1], h1, p, plan.seeds[2], plan.cast
    )
    out, pre = mlp.forward(y2, c_fc, cb_fc, c_p, cb_p, plan.activation)
    saved = (h1, mean1, rstd1, y1, qkv, a, lse, h2, mean2, rstd2, y2, pre)
    return Made(out, h2, saved, (w1, w2, c_qkv, c_o, c_fc, c_p), options, projected.dtype)


@outside_autocast
def decode(
    plan: Plan, branch: Tensor | None, x: Tensor, parameters: Sequence[Tensor | None], cache: Cache
) -> tuple[Tensor, Tensor]:
    """(mlp's output, h2) of further tokens (B, T, C); nothing is kept for a backward."""
    made = run(plan, branch, x, parameters, cache)
    return made.out.view(x.shape), made.h2.view(x.shape)


class BlockFunction(torch.autograd.Function):
    """(branch or None, x) (B, T, C) each -> (mlp's output, h2)."""

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any, plan: Plan, branch: Tensor | None, x: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        made = run(plan, branch, x, parameters)
        view = torch.ops.aten._unsafe_view.default  # an alias that autograd does not call a view
        h2 = view(made.h2, x.shape)
        ctx.save_for_backward(*made.saved[:7], h2, *made.saved[8:], *made.weights)
        ctx.plan, ctx.shape, ctx.options = plan, x.shape, made.options
        ctx.dtypes = (
            x.dtype, None if branch is None else branch.dtype, made.projected_dtype,
            *(None if t is None else t.dtype for t in parameters),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return view(made.out, x.shape), h2

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dout: Tensor | None, dh2: Tensor | None) -> Any:
        h1, mean1, rstd1, y1, qkv, a, lse, h2, mean2, rstd2, y2, pre, *weights = ctx.saved_tensors
        w1, w2, c_qkv, c_o, c_fc, c_p = weights
        plan, (B, T, C) = ctx.plan, ctx.shape
        norm, linear, attention, mlp = plan.kernels
        M, H, p = B * T, plan.n_head, plan.dropout_p
        x_dtype, branch_dtype, projected_dtype, *dtypes = ctx.dtypes
        needs = ctx.needs_input_grad
        need = needs[3:]
        dout = torch.zeros_like(y2) if dout is None else readable(dout.reshape(M, C))
        h2 = h2.view(M, C)
        dh2 = None if dh2 is None else readable(dh2.reshape(M, C))

        dy2, dw_fc, db_fc, dw_p, db_p = mlp.backward(
            dout, y2, pre, c_fc, c_p, plan.activation, dtypes[8:12], (True, *need[8:12])
        )
        dprojected, dh1, dw2, db2 = norm.backward(
            dy2, dh2, h2, w2, mean2, rstd2, projected_dtype, h1.dtype,
            p, plan.seeds[2], (True, True, *need[6:8]),
        )  # fmt: skip
        da, dw_o, db_o = linear.backward(
            dprojected, a.transpose(1, 2).reshape(M, C), c_o, None, None, *dtypes[4:6],
            (True, *need[4:6]),
        )  # fmt: skip
        q, k, v = qkv.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
        dqkv = torch.empty_like(qkv)
        into = dqkv.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind()
        attention.backward(
            da.view(B, T, H, C // H).transpose(1, 2), q, k, v, a, lse, *ctx.options,
            (True, True, True), into,
        )  # fmt: skip
        dy1, dw_qkv, db_qkv = linear.backward(
            dqkv, y1, c_qkv, None, None, *dtypes[2:4], (True, *need[2:4])
        )
        if branch_dtype is None:
            dx, _, dw1, db1 = norm.backward(
                dy1, None, h1, w1, mean1, rstd1, x_dtype, None, 0.0, 0, (needs[2], False, *need[:2])
            )
            dbranch = None
            dx = None if dx is None else dx.add_(dh1)
        else:
            dbranch, dx, dw1, db1 = norm.backward(
                dy1, dh1, h1, w1, mean1, rstd1, branch_dtype, x_dtype, p, plan.seeds[0],
                (needs[1], needs[2], *need[:2]),
            )  # fmt: skip
        same = dbranch is dx  # then one object: autograd copies before it adds to either
        dx = None if dx is None else dx.view(B, T, C)
        dbranch = dx if same else None if dbranch is None else dbranch.view(B, T, C)
        return (
            None, dbranch, dx,
            dw1, db1, dw_qkv, db_qkv, dw_o, db_o, dw2, db2, dw_fc, db_fc, dw_p, db_p,
        )  # fmt: skip
