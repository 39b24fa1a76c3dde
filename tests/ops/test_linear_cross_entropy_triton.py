"""linear_cross_entropy by Triton."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_checks import (
    DEVICE,
    DTYPES,
    bits,
    check,
    guarded,
    randn,
    short,
    strict,
    unchanged,
    yardstick,
)

from gptk.ops.linear_cross_entropy import triton_impl as fused
from gptk.ops.triton_launch import ACC

__all__ = ["strict"]

ALL = (True, True, True)


@pytest.fixture
def chunks_of_4(monkeypatch):
    monkeypatch.setattr(fused, "chunk_rows", lambda C, V, dtype: 4)


def formula(x, w, b, target, dloss, ignore_index, smoothing, softcap=None, z_loss=0.0):
    """(loss, dx, dw, db) in float64, written out."""
    x, w, dloss = x.double(), w.double(), dloss.double()
    V = w.shape[0]
    keep = (target != ignore_index)[:, None]
    at = torch.where(keep, target[:, None], 0)
    logits = x @ w.T + (0.0 if b is None else b.double())
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(z, 1, keepdim=True)
    loss = lse - (1 - smoothing) * z.gather(1, at) - smoothing / V * z.sum(1, keepdim=True)
    loss += z_loss * lse**2
    dz = torch.exp(z - lse) * (1 + 2 * z_loss * lse) - smoothing / V
    dz.scatter_add_(1, at, torch.full_like(at, -(1 - smoothing), dtype=torch.float64))
    dz = dz if softcap is None else dz / torch.cosh(logits / softcap) ** 2
    dz = torch.where(keep, dz * dloss[:, None], 0.0)
    return (loss * keep)[:, 0], dz @ w, dz.T @ x, dz.sum(0)


def torch_loss(x, w, b, target, dloss, ignore_index, smoothing, softcap=None, z_loss=0.0):
    """torch's unfused loss and gradients in the inputs' dtype."""
    x, w, b = (
        None if t is None else t.clone().requires_grad_() for t in yardstick(x.dtype, x, w, b)
    )
    z = F.linear(x, w, b)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(
        z, target, reduction="none", ignore_index=ignore_index, label_smoothing=smoothing
    )
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(z, 1).square() * (target != ignore_index)
    leaves = [t for t in (x, w, b) if t is not None]
    return loss.detach(), *torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))


@pytest.mark.parametrize("options", [(0.0,), (0.1,), (0.0, 2.0, 0.1), (0.1, 1.5, 0.0)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.usefixtures("chunks_of_4")
def test_matches_formula_over_several_chunks(dtype, has_bias, options):
    """options: label smoothing, softcap, z-loss."""
    N, C, V = 27, 8, 37
    x, w = randn(N, C, dtype=dtype), randn(V, C, dtype=dtype, scale=0.5)
    b = randn(V, dtype=dtype) if has_bias else None
    target = torch.randint(0, V, (N,), device=DEVICE)
    target[5:9] = -100  # a whole chunk's worth
    dloss = randn(N, dtype=ACC[dtype])
    before = bits(x, w, b, target, dloss)
    options = (-100, *options)
    ref, *grads = formula(x, w, b, target, dloss, *options)
    base, *base_grads = torch_loss(x, w, b, target, dloss, *options)
    loss, lse = fused.forward(x, w, b, target, *options)
    if base.dtype != loss.dtype and dtype != torch.float64:  # 16 bits: the loss leaves in float32
        base = torch_loss(*(None if t is None else t.float() for t in (x, w, b)), target, dloss,
                          *options)[0]  # fmt: skip
    check(loss, ref, base, 2)
    needs = (True, True, has_bias)
    got = fused.backward(dloss, x, w, b, target, lse, dtype, dtype, needs, *options)
    assert (got[2] is None) == (not has_bias)
    for mine, exact, theirs in zip(got[: len(base_grads)], grads, base_grads, strict=False):
        check(mine, exact, theirs, 3)
    assert unchanged(before, x, w, b, target, dloss)


@pytest.mark.usefixtures("chunks_of_4")
def test_only_the_wanted_gradients_are_returned():
    x, w, b, target = randn(6, 3), randn(5, 3), randn(5), torch.arange(6, device=DEVICE) % 5
    dtypes = (torch.float32, torch.float32)
    _, lse = fused.forward(x, w, b, target, -100, 0.0)
    dloss = randn(6)
    full = fused.backward(dloss, x, w, b, target, lse, *dtypes, ALL, -100, 0.0)
    for needs in itertools.product([True, False], repeat=3):
        got = fused.backward(dloss, x, w, b, target, lse, *dtypes, needs, -100, 0.0)
        for need, mine, all_of_them in zip(needs, got, full, strict=True):
            assert torch.equal(mine, all_of_them) if need else mine is None


def test_weight_gradient_does_not_stall_in_16_bits(monkeypatch):
    """One large row, then 64 chunks of 2^-9 of it: a bfloat16 sum stays at the large one."""
    monkeypatch.setattr(fused, "chunk_rows", lambda C, V, dtype: 1)
    N, bf16 = 65, torch.bfloat16
    x = guarded(torch.ones(N, 4, dtype=bf16))
    w = guarded(torch.zeros(8, 4, dtype=bf16))
    target = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    dloss = torch.full((N,), 2.0**-9, device=DEVICE)
    dloss[0] = 1.0
    lse = torch.full((N,), math.log(8), device=DEVICE)
    needs = (False, True, True)
    _, dw, db = fused.backward(dloss, x, w, None, target, lse, bf16, bf16, needs, -100, 0.0)
    want = torch.full((8,), 0.125) * 1.125
    want[0] = -0.875 * 1.125
    for got in (dw.float().cpu(), db.float().cpu()[:, None]):
        assert ((got - want[:, None]).abs() <= 2**-8 * want.abs()[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.usefixtures("chunks_of_4")
def test_no_tensor_grows_with_rows_times_vocabulary(dtype):
    N, C, V = 40, 3, 50

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.nbytes = max(self.nbytes, *sizes, 0)
            return out

    x, w = randn(N, C, dtype=dtype), randn(V, C, dtype=dtype)
    target = torch.arange(N, device=DEVICE) % V
    with Largest() as largest:
        loss, lse = fused.forward(x, w, None, target, -100, 0.0)
        fused.backward(loss, x, w, None, target, lse, dtype, None, (True, True, False), -100, 0.0)
    assert largest.nbytes == 4 * V * 4  # one chunk of float32 logits


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("V", [1, 256, 50304, 128256, 2**24])
@pytest.mark.parametrize("C", [1, 768, 8192])
def test_chunks_are_bounded_and_independent_of_the_rows(C, V, dtype):
    rows = fused.chunk_rows(C, V, dtype)
    assert rows >= 16
    assert rows & (rows - 1) == 0
    assert rows == 16 or rows * V * ACC[dtype].itemsize <= 256 << 20


@pytest.mark.usefixtures("chunks_of_4")
def test_nan_stays_in_its_row():
    x, w, target = randn(10, 3), randn(5, 3), torch.arange(10, device=DEVICE) % 5
    x[5] = math.nan
    loss, lse = fused.forward(x, w, None, target, -100, 0.0)
    bad = [i == 5 for i in range(10)]
    assert loss.isnan().tolist() == bad
    ones, dtype = torch.ones_like(loss), torch.float32
    needs = (True, False, False)
    dx, _, _ = fused.backward(ones, x, w, None, target, lse, dtype, None, needs, -100, 0.0)
    assert dx.isnan().any(1).tolist() == bad
