"""A block's forward and backward as one call each of the C++ extension (csrc/block.h).

The kernels and their arguments are those of gptk/block.py, in the same order: the same bits. What
falls away is Python between them, some 20 allocations, and the page faults of what lives only
within a call, which lies in a workspace that is kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptk.block import OPS, Plan, parameter_sizes
from gptk.native import (
    ACTIVATION,
    DTYPE,
    MASK64,
    alive,
    available,
    empty,
    isa,
    load,
    threads,
    workspace,
)
from gptk.ops.contract import kernels_of
from gptk.ops.cpp_epilogue import own
from gptk.ops.cpp_product import owns
from gptk.ops.tensors import once_differentiable, outside_autocast, readable

NORMS, MATRICES, BIASES = (0, 1, 6, 7), (2, 4, 8, 10), (3, 5, 9, 11)
"""Places of a block's parameters: w1 b1 w_qkv b_qkv w_o b_o w2 b2 w_fc b_fc w_p b_p."""


class LayerCache(NamedTuple):
    """Where the keys and values of one layer are: (B, H, capacity, D) each, `past` of them used."""

    k: Tensor
    v: Tensor
    past: int


def has_room(cache: LayerCache, shape: "Shape") -> bool:
    """Can the block's tokens be written where the cache says? Else KVCache.append converts, or has
    the words for what is wrong."""
    B, T, C, H, _ = shape.sizes
    return (
        cache.k.shape == cache.v.shape == (B, H, cache.k.shape[2], C // H)
        and cache.k.dtype == cache.v.dtype == shape.compute
        and cache.past + T <= cache.k.shape[2]
        and cache.k.is_contiguous()
        and cache.v.is_contiguous()
        and cache.k.is_cpu
        and cache.v.is_cpu
    )


class Shape(NamedTuple):
    """Sizes, dtypes and memory of a block that the extension can do in one call."""

    sizes: tuple[int, int, int, int, int]  # B, T, C, H, hidden
    compute: torch.dtype
    h1: torch.dtype
    h2: torch.dtype
    matrix: torch.dtype
    bias: torch.dtype
    norm: torch.dtype
    threads: int
    saved: int  # bytes
    forward_scratch: int
    backward_scratch: int


def shape_of(
    plan: Plan,
    branch: Tensor | None,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    backward: bool = True,
) -> Shape | None:
    """None where it takes more than the extension's kernels: other products, casts of weights.

    Args:
        backward: will there be one? Its products may be torch's where the forward's are not.
    """
    if plan.kernels[0].__name__ != "gptk.ops.layer_norm.cpp_impl":
        return None
    w_fc = parameters[8]
    assert w_fc is not None
    key = (
        plan.kernels, plan.n_head, plan.cast, x.shape, x.dtype,
        None if branch is None else branch.dtype, w_fc.shape[0], backward, threads(),
        *(None if t is None else t.dtype for t in parameters),
    )  # fmt: skip
    known = _shapes.setdefault(isa(), {})
    if key not in known:
        known[key] = _shape_of(key)
    return known[key]


_shapes: dict[str, dict[Any, Shape | None]] = {}


def _shape_of(key: tuple[Any, ...]) -> Shape | None:
    kernels, H, cast, (B, T, C), x_dtype, branch_dtype, hidden, backward, n_threads, *dtypes = key
    if available() is not None or kernels != kernels_of(OPS, "cpp", "cpu", x_dtype):
        return None
    h1 = x_dtype if branch_dtype is None else torch.promote_types(branch_dtype, x_dtype)
    compute = cast or h1
    h2 = torch.promote_types(compute, h1)
    kinds = [{dtypes[i] for i in places} - {None} for places in (MATRICES, BIASES, NORMS)]
    allowed = {compute, torch.float32} if cast is not None else {compute}
    if any(len(kind) > 1 for kind in kinds) or not (kinds[0] | kinds[1]) <= allowed:
        return None
    ours = own(compute, B * T) if backward else owns(compute)
    if torch.float64 in (h1, h2, compute) or not ours:
        return None
    extension = load()
    sizes = (B, T, C, H, hidden)
    matrix, bias, norm = (next(iter(kind), torch.float32) for kind in kinds)
    codes = (DTYPE[compute], DTYPE[h1])
    return Shape(
        sizes, compute, h1, h2, matrix, bias, norm, n_threads,
        extension.block_saved(*sizes, branch_dtype is not None, *codes),
        extension.block_forward_scratch(*sizes, codes[0], n_threads),
        extension.block_backward_scratch(*sizes, *codes, n_threads),
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def run(
    plan: Plan,
    shape: Shape,
    branch: Tensor | None,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    saved: Tensor,
    cache: LayerCache | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, h2), and `saved` filled; x and branch contiguous, parameters as they are read."""
    B, T, C, _, _ = shape.sizes
    out = empty((B, T, C), shape.compute)
    h2 = empty((B, T, C), shape.h2)
    scratch = workspace("block", shape.forward_scratch, torch.uint8)
    load().block_forward(
        out.data_ptr(),
        h2.data_ptr(),
        saved.data_ptr(),
        0 if cache is None else cache.k.data_ptr(),
        0 if cache is None else cache.v.data_ptr(),
        scratch.data_ptr(),
        x.data_ptr(),
        _address(branch),
        *map(_address, parameters),
        *shape.sizes,
        0 if cache is None else cache.past,
        0 if cache is None else cache.k.shape[2],
        *plan.eps,
        plan.dropout_p,
        *_seeds(plan),
        ACTIVATION[plan.activation],
        DTYPE[shape.compute],
        DTYPE[x.dtype],
        0 if branch is None else DTYPE[branch.dtype],
        DTYPE[shape.h1],
        DTYPE[shape.h2],
        DTYPE[shape.matrix],
        DTYPE[shape.bias],
        DTYPE[shape.norm],
        shape.threads,
    )
    alive(saved, scratch, x, branch, *parameters, *(() if cache is None else cache[:2]))
    return out, h2


def _seeds(plan: Plan) -> tuple[int, int, int]:
    if not plan.dropout_p:
        return 0, 0, 0
    branch, attention, projection = (int(seed) & MASK64 for seed in plan.seeds)
    return branch, attention, projection


@outside_autocast
def decode(
    plan: Plan,
    shape: Shape,
    branch: Tensor | None,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    cache: LayerCache,
) -> tuple[Tensor, Tensor]:
    """(mlp's output, h2) of further tokens (B, T, C), whose keys and values join the cache."""
    saved = workspace("decoded", shape.saved, torch.uint8)
    branch = None if branch is None else readable(branch)
    read = [None if t is None else readable(t) for t in parameters]
    return run(plan, shape, branch, readable(x), read, saved, cache)


class NativeBlockFunction(torch.autograd.Function):
    """(branch or None, x) (B, T, C) each -> (mlp's output, h2), as BlockFunction."""

    @staticmethod
    @outside_autocast
    def forward(
        ctx: Any,
        plan: Plan,
        shape: Shape,
        branch: Tensor | None,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        read = [None if t is None else readable(t) for t in parameters]
        x = readable(x)
        branch = None if branch is None else readable(branch)
        saved = empty((shape.saved,), torch.uint8)
        out, h2 = run(plan, shape, branch, x, read, saved)
        matrices = (read[2], read[4], read[8], read[10])
        ctx.save_for_backward(x if branch is None else None, h2, saved, read[0], read[6], *matrices)
        ctx.plan, ctx.shape = plan, shape
        ctx.dtypes = (x.dtype, None if branch is None else branch.dtype)
        ctx.set_materialize_grads(False)
        return out, h2

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dout: Tensor | None, dh2: Tensor | None) -> Any:
        x, h2, saved, w1, w2, w_qkv, w_o, w_fc, w_p = ctx.saved_tensors
        plan, shape = ctx.plan, ctx.shape
        x_dtype, branch_dtype = ctx.dtypes
        _, _, C, _, hidden = shape.sizes
        _, _, need_branch, need_x, *needs = ctx.needs_input_grad
        dout = torch.zeros_like(h2, dtype=shape.compute) if dout is None else readable(dout)
        dh2 = None if dh2 is None else readable(dh2)
        dx = empty(h2.shape, x_dtype) if need_x else None
        # one object where both have one value: autograd copies before it adds to either
        same = need_x and plan.dropout_p == 0 and x_dtype == branch_dtype
        apart = need_branch and not same
        dbranch = empty(h2.shape, branch_dtype) if apart else None
        dh1 = empty(h2.shape, shape.h1) if branch_dtype is None else None
        gradients = [
            empty(size, dtype) if need else None
            for size, dtype, need in zip(
                parameter_sizes(C, hidden), _parameter_dtypes(shape), needs, strict=True
            )
        ]
        n_threads, size = threads(), shape.backward_scratch
        if n_threads != shape.threads:  # a forked child, or set_num_threads after the forward
            codes = (DTYPE[shape.compute], DTYPE[shape.h1])
            size = load().block_backward_scratch(*shape.sizes, *codes, n_threads)
        scratch = workspace("block", size, torch.uint8)
        load().block_backward(
            _address(dx),
            _address(dbranch),
            _address(dh1),
            *map(_address, gradients),
            scratch.data_ptr(),
            dout.data_ptr(),
            _address(dh2),
            h2.data_ptr(),
            saved.data_ptr(),
            _address(x),
            *map(_address, (w1, w_qkv, w_o, w2, w_fc, w_p)),
            *shape.sizes,
            plan.dropout_p,
            *_seeds(plan),
            branch_dtype is not None,
            ACTIVATION[plan.activation],
            DTYPE[shape.compute],
            DTYPE[x_dtype],
            0 if branch_dtype is None else DTYPE[branch_dtype],
            DTYPE[shape.h1],
            DTYPE[shape.h2],
            DTYPE[shape.matrix],
            DTYPE[shape.bias],
            DTYPE[shape.norm],
            n_threads,
        )
        alive(dh1, scratch, dout, dh2, h2, saved, x, w1, w_qkv, w_o, w2, w_fc, w_p)
        if dh1 is not None and dx is not None:
            dx.add_(dh1)
        return None, None, dx if same and need_branch else dbranch, dx, *gradients


def _parameter_dtypes(shape: Shape) -> list[torch.dtype]:
    """Of each parameter, in order."""
    found = [shape.bias] * 12
    for place in NORMS:
        found[place] = shape.norm
    for place in MATRICES:
        found[place] = shape.matrix
    return found
