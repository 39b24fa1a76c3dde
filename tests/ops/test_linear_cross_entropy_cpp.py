"""The C++ linear_cross_entropy forms its gradients with the loss; nobody can tell from outside."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from equivalence import require

import gptk.functional as GF
from gptk import native

if native.available() is not None:
    pytest.skip(native.available(), allow_module_level=True)

from gptk.ops.cpp_product import owns
from gptk.ops.linear_cross_entropy import cpp_impl


@pytest.fixture(autouse=True)
def _chunks_of_4(monkeypatch):
    require("cpp", "linear_cross_entropy")
    monkeypatch.setattr(cpp_impl, "chunk_rows", lambda V: 4)


def inputs(N=13, C=8, V=11, ignored=2, dtype=torch.float64):
    torch.manual_seed(N + V)
    x, w, b = torch.randn(N, C), torch.randn(V, C), torch.randn(V)
    target = torch.randint(V, (N,))
    target[:ignored] = -100
    leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
    return leaves, target


def loss(leaves, target, reduction="mean", **how):
    x, w, b = leaves
    return GF.linear_cross_entropy(
        x, w, target, linear_bias=b, reduction=reduction, backend="cpp", **how
    )


def torchs(leaves, target, reduction="mean", softcap=None, z_loss=0.0):
    x, w, b = leaves
    z = F.linear(x, w, b)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    squares = z_loss * (torch.logsumexp(z, 1) ** 2)[target != -100]
    squares = squares.mean() if reduction == "mean" else squares.sum()
    return F.cross_entropy(z, target, reduction=reduction) + squares


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("upstream", [1.0, -0.25, 3.0])
@pytest.mark.parametrize("options", [{}, dict(softcap=1.5, z_loss=0.1)], ids=["plain", "capped"])
def test_any_upstream_gradient(reduction, upstream, options):
    leaves, target = inputs()
    value = loss(leaves, target, reduction, **options)
    right = torchs(leaves, target, reduction, **options)
    torch.testing.assert_close(value, right)
    ours = torch.autograd.grad(upstream * value, leaves)
    theirs = torch.autograd.grad(upstream * right, leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_backward_gives_the_same_and_shares_no_memory():
    leaves, target = inputs()
    value = loss(leaves, target)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for scale in (1.0, 2.0):
        again = torch.autograd.grad(scale * value, leaves, retain_graph=True)
        for a, b in zip(again, kept, strict=True):
            torch.testing.assert_close(a, scale * b)
    torch.autograd.grad(value, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaves)


def test_micro_batches_add_up():
    leaves, target = inputs(N=12, ignored=0)
    x, w, b = leaves
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        (loss((x[rows], w, b), target[rows]) / 3).backward()
    expected = torch.autograd.grad(torchs(leaves, target), leaves)
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_wanted_gradients_are_formed(wanted):
    leaves, target = inputs()
    given = [leaf if i in wanted else leaf.detach() for i, leaf in enumerate(leaves)]
    asked = [given[i] for i in wanted]
    ours = torch.autograd.grad(loss(given, target), asked)
    theirs = torch.autograd.grad(torchs(given, target), asked)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_but_ignored_rows():
    leaves, target = inputs(N=3, ignored=3)
    value = loss(leaves, target)
    assert value.isnan()
    for grad in torch.autograd.grad(value, leaves):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_without_gradients_none_are_formed(monkeypatch):
    leaves, target = inputs()
    monkeypatch.setattr(cpp_impl, "loss_and_gradients", None)
    with torch.no_grad():
        first = loss(leaves, target)
    second = loss([leaf.detach() for leaf in leaves], target)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torchs(leaves, target).detach())


def test_a_second_derivative_is_refused():
    leaves, target = inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(leaves, target), leaves, create_graph=True)


def test_a_weight_changed_after_the_loss_changes_no_gradient():
    """They are there already; only forming them again needs the weight."""
    leaves, target = inputs()
    expected = torch.autograd.grad(loss(leaves, target), leaves)
    value = loss(leaves, target)
    with torch.no_grad():
        leaves[1].mul_(2)
    for a, b in zip(torch.autograd.grad(value, leaves, retain_graph=True), expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("how", ["autocast", "parameters"])
def test_a_scaled_float16_loss_does_not_underflow(how, reduction):
    """The scale of a GradScaler must reach the gradients of the logits before they are rounded."""
    torch.manual_seed(0)
    N, C, V, scale = 64, 16, 3000, 16384.0 / (64 if reduction == "sum" else 1)
    kind = torch.float16 if how == "parameters" else torch.float32
    x, w = torch.randn(N, C).to(kind).requires_grad_(), torch.randn(V, C).to(kind).requires_grad_()
    target = torch.randint(V, (N,))
    found = {}
    for backend in ("cpp", "torch"):
        with torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
            value = GF.linear_cross_entropy(x, w, target, reduction=reduction, backend=backend)
        found[backend] = torch.autograd.grad(value.float() * scale, (x, w))
    wide = [t.detach().half().double().requires_grad_() for t in (x, w)]
    exact = torch.autograd.grad(
        F.cross_entropy(wide[0] @ wide[1].t(), target, reduction=reduction) * scale, wide
    )
    for ours, theirs, right in zip(found["cpp"], found["torch"], exact, strict=True):
        assert (ours - right).norm() <= 2 * (theirs - right).norm() + 1e-3 * right.norm()


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf])
def test_a_broken_upstream_gradient_leaves_ignored_rows_alone(upstream):
    leaves, target = inputs(ignored=2)
    dx, _, _ = torch.autograd.grad(loss(leaves, target), leaves, torch.tensor(upstream).double())
    assert (dx[:2] == 0).all()
    assert not dx[2:].isfinite().any()


def test_a_loss_that_is_dropped_takes_its_gradients_with_it():
    leaves, target = inputs()
    value = loss(leaves, target)
    gradient = weakref.ref(value.grad_fn.gradients[1])
    assert gradient() is not None
    del value
    gc.collect()
    assert gradient() is None


def test_under_autocast_the_weight_gradient_is_float32_and_summed_in_it():
    leaves, target = inputs(N=64, C=32, V=40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(leaves, target)
    assert value.dtype == torch.float32
    x, w, b = (leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves)
    exact = torch.autograd.grad(torchs((x, w, b), target), (x, w, b))
    for ours, right, leaf in zip(torch.autograd.grad(value, leaves), exact, leaves, strict=True):
        assert ours.dtype == leaf.dtype
        assert (ours - right).norm() < 1e-2 * right.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, dict(softcap=1.5, z_loss=0.1)], ids=["plain", "capped"])
def test_16_bit_gradients_of_the_logits_change_no_bit(dtype, reduction, options, monkeypatch):
    leaves, target = inputs(N=13, C=24, V=1100, dtype=dtype)
    leaves[2] = None  # a bias's gradient is summed before they are rounded
    if not owns(dtype):
        pytest.skip("products in this dtype are torch's here, of float32 logits")

    def gradients():
        value = loss(leaves, target, reduction, **options)
        return torch.autograd.grad(value.sum(), leaves[:2])

    found = gradients()
    monkeypatch.setattr(cpp_impl._Chunks, "in_place", lambda self, logits: logits)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(), strict=True))
