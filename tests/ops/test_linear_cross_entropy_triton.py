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

from gptk.ops.linear_cross_entropy import triton_chunks, triton_logits
from gptk.ops.linear_cross_entropy import triton_impl as fused
from gptk.ops.triton_launch import ACC

__all__ = ["strict"]

ALL = (True, True, True)


PLAIN = triton_logits.Terms(-100, 0.0, None, 0.0)
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def small(monkeypatch):
    """Chunks of 4 rows or 32 classes, tiles of 16 by 16 classes by 16."""
    monkeypatch.setattr(triton_chunks, "chunk_rows", lambda C, V, dtype: 4)
    monkeypatch.setattr(fused, "chunk_classes", lambda N, V: min(V, 32))
    monkeypatch.setattr(fused, "ROWS", 20)
    monkeypatch.setattr(triton_logits, "launch_config", lambda *_: (16, 16, 16, 4, 1))
    monkeypatch.setattr(triton_logits, "_group", lambda N, C, block_m: 2)


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
@pytest.mark.usefixtures("small")
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


@pytest.mark.usefixtures("small")
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
    monkeypatch.setattr(fused, "chunk_classes", lambda N, V: 1)
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
@pytest.mark.usefixtures("small")
def test_no_tensor_grows_with_rows_times_vocabulary(dtype):
    """One chunk of float32 logits; in 16 bits the dlogits of 32 classes, which torch's products on
    the CPU are given in float32."""
    N, C, V = 80, 3, 100

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
    assert largest.nbytes == (4 * V * 4 if dtype == torch.float32 else N * 32 * 4)


@pytest.mark.parametrize("V", [1, 256, 50304, 128256, 2**24])
@pytest.mark.parametrize("C", [1, 768, 8192])
def test_chunks_of_rows_are_bounded_and_independent_of_the_rows(C, V):
    for dtype in (torch.float32, torch.float64):
        rows = triton_chunks.chunk_rows(C, V, dtype)
        assert rows >= 16
        assert rows & (rows - 1) == 0
        assert rows == 16 or rows * V * dtype.itemsize <= 256 << 20


@pytest.mark.parametrize("V", [1, 65, 256, 50257, 128256, 2**24])
@pytest.mark.parametrize("N", [1, 100, 8192, 2**17, 2**22])
def test_chunks_of_classes_are_an_eighth_and_bounded(N, V):
    classes = fused.chunk_classes(N, V)
    assert classes == V or classes % 256 == 0
    assert 1 <= classes <= V
    assert N * classes <= max(N * V // 8, 2**24, N * 256)
    assert N * classes <= max(2**28, N * 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.usefixtures("small")
def test_nan_stays_in_its_row(dtype):
    x, w, target = randn(10, 3), randn(5, 3), torch.arange(10, device=DEVICE) % 5
    x, w = x.to(dtype), w.to(dtype)
    x[5] = math.nan
    loss, lse = fused.forward(x, w, None, target, -100, 0.0)
    bad = [i == 5 for i in range(10)]
    assert loss.isnan().tolist() == bad
    ones = torch.ones_like(loss)
    needs = (True, False, False)
    dx, _, _ = fused.backward(ones, x, w, None, target, lse, dtype, None, needs, -100, 0.0)
    assert dx.isnan().any(1).tolist() == bad


@pytest.mark.parametrize(
    "C, has_bias, changes, kind",
    [
        (768, False, {}, "plain"),
        (768, False, {"z_loss": 1e-4}, "plain"),
        (768, True, {}, "extras"),
        (768, False, {"label_smoothing": 0.1}, "extras"),
        (776, False, {}, "extras"),
        (768, True, {"softcap": 30.0}, "softcap"),
    ],
)
def test_what_is_done_to_a_tile_chooses_its_configuration(C, has_bias, changes, kind):
    assert triton_logits.kind_of(C, has_bias, PLAIN._replace(**changes)) == kind


@pytest.mark.parametrize("C, V", [(8, 70), (40, 33), (32, 64)])
@pytest.mark.parametrize("dtype", HALVES, ids=short)
@pytest.mark.usefixtures("small")
def test_by_descriptors_and_by_addresses_give_the_same_bits(monkeypatch, dtype, C, V):
    """C = 8: a row of 16 bytes, the least that a descriptor takes; 40: a tile ends within it."""
    N = 21
    x, w, b = randn(N, C, dtype=dtype), randn(V, C, dtype=dtype), randn(V, dtype=dtype)
    target = torch.randint(0, V, (N,), device=DEVICE)
    dloss = randn(N)
    found = {}
    for arch in (80, 90):
        monkeypatch.setattr(triton_logits, "architecture", lambda device, arch=arch: arch)
        _, _, flags, _ = triton_logits.operands(x, w, True, "forward", PLAIN)
        assert flags["BY_DESCRIPTOR"] == (arch == 90)
        options = (-100, 0.1, 3.0, 0.01)
        loss, lse = fused.forward(x, w, b, target, *options)
        grads = fused.backward(dloss, x, w, b, target, lse, dtype, dtype, ALL, *options)
        found[arch] = (loss, lse, *grads)
    for by_address, by_descriptor in zip(found[80], found[90], strict=True):
        assert torch.equal(by_address, by_descriptor)


@pytest.mark.usefixtures("small")
def test_rows_that_are_no_multiple_of_16_bytes_are_copied(monkeypatch):
    """As what a descriptor reads: 3 columns become 8, and a beginning 2 bytes past 16 moves."""
    monkeypatch.setattr(triton_logits, "architecture", lambda device: 90)
    for columns, want in ((3, 8), (8, 8), (12, 16)):
        matrix = randn(5, columns, dtype=torch.bfloat16)
        copy = triton_logits.in_sixteens(matrix)
        assert copy.shape == (5, want)
        assert torch.equal(copy[:, :columns], matrix)
        assert (copy[:, columns:] == 0).all()
        assert (copy is matrix) == (columns == want)
    shifted = randn(65, dtype=torch.bfloat16)[1:].view(8, 8)
    assert triton_logits.in_sixteens(shifted).data_ptr() % 16 == 0
    w, target = randn(40, 8, dtype=torch.bfloat16), torch.arange(8, device=DEVICE)
    loss, _ = fused.forward(shifted, w, None, target, -100, 0.0)
    assert torch.equal(loss, fused.forward(shifted.clone(), w, None, target, -100, 0.0)[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", HALVES, ids=short)
@pytest.mark.usefixtures("small")
def test_large_logits_lose_nothing(dtype, smoothing):
    """Logits of +-1e4: exact products, so the loss has float32's precision."""
    N, V = 20, 50
    x, w = torch.zeros(N, 4, dtype=dtype), torch.zeros(V, 4, dtype=dtype)
    x[:, 0], w[:, 0] = 128.0, 72.0
    x[:, 1], w[:, 1] = 1.0, torch.arange(V) / 8
    x[::2, 0] *= -1
    x, w = guarded(x), guarded(w)
    target = torch.arange(N, device=DEVICE) * 2 % V
    dloss = torch.ones(N, device=DEVICE)
    want = formula(x, w, None, target, dloss, -100, smoothing)[0]
    loss, _ = fused.forward(x, w, None, target, -100, smoothing)
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("small")
def test_a_bias_of_minus_infinity_rules_classes_out():
    """Whole tiles of them too; the loss of such a target is infinite."""
    N, C, V = 6, 8, 70
    x, w = randn(N, C, dtype=torch.bfloat16), randn(V, C, dtype=torch.bfloat16)
    b = torch.zeros(V, dtype=torch.bfloat16)
    b[:40] = -math.inf
    b = guarded(b)
    target = torch.tensor([40, 50, 69, 3, 45, -100], device=DEVICE)
    loss, lse = fused.forward(x, w, b, target, -100, 0.0)
    dloss = torch.ones(N, device=DEVICE)
    left = torch.tensor([0, 10, 29, -100, 5, -100], device=DEVICE)  # of the classes from 40 on
    want, _, _, db_want = formula(x, w[40:], None, left, dloss, -100, 0.0)
    assert loss[3] == math.inf
    torch.testing.assert_close(loss.double()[left >= 0], want[left >= 0], rtol=1e-5, atol=1e-5)
    dloss[3] = 0.0
    dtypes = (torch.float32, torch.float32)
    _, dw, db = fused.backward(dloss, x, w, b, target, lse, *dtypes, ALL, -100, 0.0)
    assert torch.equal(dw[:40], torch.zeros_like(dw[:40]))
    assert torch.equal(db[:40], torch.zeros_like(db[:40]))
    torch.testing.assert_close(db[40:].double(), db_want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small")
def test_a_target_outside_the_classes_is_nan_in_its_row_only():
    x, w = randn(5, 8, dtype=torch.bfloat16), randn(40, 8, dtype=torch.bfloat16)
    target = torch.tensor([0, 40, 2, -1, 39], device=DEVICE)
    loss, lse = fused.forward(x, w, None, target, -100, 0.0)
    assert loss.isnan().tolist() == [False, True, False, True, False]
    needs, dtype = (True, False, False), torch.bfloat16
    dloss = torch.ones(5, device=DEVICE)
    dx, _, _ = fused.backward(dloss, x, w, None, target, lse, dtype, None, needs, -100, 0.0)
    assert dx.isnan().all(1).tolist() == [False, True, False, True, False]
