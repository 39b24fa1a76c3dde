"""softcap and z_loss of cross_entropy and linear_cross_entropy, on every backend."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from equivalence import DTYPES, KERNELS, require
from interpreter_checks import assert_close, guarded

import gptk.functional as GF
from gptk import nn as gnn

BACKENDS = ("torch", *KERNELS)
OPTIONS = [dict(softcap=30.0), dict(z_loss=0.1), dict(softcap=2.5, z_loss=1e-2)]


def named(value):
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    return str(value).removeprefix("torch.")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return require(request.param, "cross_entropy")


@pytest.fixture(params=KERNELS)
def kernel(request):
    return require(request.param, "cross_entropy")


def implementation(backend, op="cross_entropy"):
    return importlib.import_module(f"gptk.ops.{op}.{backend}_impl")


def loss_rows(logits, target, smoothing=0.0, softcap=None, z_loss=0.0):
    """The loss of each row, in the logits' dtype, by torch's elementary functions."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    keep = target != -100
    at = torch.where(keep, target, 0)[:, None]
    lse = torch.logsumexp(z, 1)
    loss = lse - (1 - smoothing) * z.gather(1, at)[:, 0] - smoothing * z.mean(1) + z_loss * lse**2
    return torch.where(keep, loss, 0.0)


def torch_rows(logits, target, smoothing=0.0, softcap=None, z_loss=0.0):
    """The same by torch's cross_entropy: the yardstick."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    rows = F.cross_entropy(z, target, reduction="none", label_smoothing=smoothing)
    return rows + z_loss * torch.where(target == -100, 0.0, torch.logsumexp(z, 1) ** 2)


def closed_form(logits, target, smoothing=0.0, softcap=None, z_loss=0.0):
    """d loss / d logits of each row in float64, written out."""
    logits = logits.double()
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    keep = (target != -100)[:, None]
    at = torch.where(keep, target[:, None], 0)
    lse = torch.logsumexp(z, 1, keepdim=True)
    dz = torch.exp(z - lse) * (1 + 2 * z_loss * lse) - smoothing / z.shape[1]
    dz.scatter_add_(1, at, torch.full_like(at, -(1 - smoothing), dtype=torch.float64))
    if softcap is not None:
        dz = dz / torch.cosh(logits / softcap) ** 2
    return torch.where(keep, dz, 0.0)


def compare(logits, target, backend, smoothing=0.0, **options):
    """Losses and gradients of rows against float64, measured in what torch's float32 loses."""
    dtype = logits.dtype
    dloss = torch.linspace(-1.5, 2.0, len(target)).to(dtype)
    leaf = logits.clone().requires_grad_()
    loss = GF.cross_entropy(
        leaf, target, reduction="none", label_smoothing=smoothing, backend=backend, **options
    )
    loss.backward(dloss)
    single = logits.float().requires_grad_()
    torchs = torch_rows(single, target, smoothing, **options)
    torchs.backward(dloss.float())
    kind = torch.float32 if dtype == torch.float64 else dtype
    twice = 2 if dtype == torch.float64 else 1  # what it is compared with errs as much
    exact = loss_rows(logits.double(), target, smoothing, **options)
    assert loss.dtype == leaf.grad.dtype == dtype
    assert_close("loss", loss.detach(), torchs.detach().to(kind), exact, 2 * twice)
    exact = closed_form(logits, target, smoothing, **options) * dloss.double()[:, None]
    assert_close("dlogits", leaf.grad, single.grad.to(kind), exact, 3 * twice)
    ignored = target == -100
    assert not loss[ignored].any()
    assert not leaf.grad[ignored].any()


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("V", [2, 33, 5000])
def test_losses_and_gradients_are_the_formulas(V, dtype, smoothing, options, backend):
    torch.manual_seed(V)
    N = 12 if V < 100 else 5
    logits = guarded((torch.randn(N, V) * 4).to(dtype))
    target = torch.randint(V, (N,))
    target[1], target[3] = -100, V - 1
    compare(logits, target, backend, smoothing, **options)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_logits_of_1e4_under_a_softcap(dtype, smoothing, z_loss, backend):
    """All of them at the cap, none, and logits whose slope is next to 0."""
    row = torch.tensor([1e4, -1e4, 1e4, 0.0, 150.0, 1e-3])
    logits = torch.stack([row, -row, row.flip(0), torch.full((6,), -1e4), row / 1e4, row / 300])
    target = torch.tensor([0, 3, 4, 5, 5, -100])
    compare(guarded(logits.to(dtype)), target, backend, smoothing, softcap=30.0, z_loss=z_loss)


def test_logits_of_1e4_with_a_z_loss(backend):
    torch.manual_seed(0)
    for offset in (1e4, -1e4):
        logits = guarded((torch.randn(5, 9, dtype=torch.float64) + offset).to(torch.float64))
        compare(logits, torch.tensor([0, 8, -100, 3, 4]), backend, z_loss=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=named)
def test_the_cap_and_its_slope_are_relatively_accurate(dtype, kernel):
    """Rows of one class: lse is the capped logit, and the slope is dlogits / (2 z_loss lse)."""
    x = torch.cat([torch.logspace(-30, 1.5, 30), torch.linspace(0.3, 1.0, 30)]).double()
    x[::2] *= -1
    softcap, z_loss = 30.0, 2.0**19
    logits = guarded((softcap * x)[:, None].to(dtype))
    x = logits[:, 0].double() / softcap
    options = (-100, 0.0, softcap, z_loss)
    target = torch.zeros(len(x), dtype=torch.int64)
    impl = implementation(kernel)
    _, lse = impl.forward(logits, target, *options)
    eps = torch.finfo(dtype).eps
    capped = softcap * torch.tanh(x)
    assert ((lse.double() - capped).abs() <= 4 * eps * capped.abs()).all()
    unit = torch.ones_like(lse)
    # with lse = 1: p = exp(z - 1) (1 + 2 z_loss), for float32 divided by its sum; dz = p - 1
    dlogits = impl.backward(unit, logits, target, lse * 0 + 1, *options)[:, 0].double()
    slope = 2 * z_loss / torch.cosh(x) ** 2
    allowed = (8 + 4 * x.abs()) * eps  # a unit of the last place of x is 2 |x| of the slope's
    assert ((dlogits - slope).abs() <= allowed * slope + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("options", OPTIONS[1:], ids=named)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(reduction, options, kernel):
    torch.manual_seed(1)
    logits = (torch.randn(3, 4, dtype=torch.float64) * 3).requires_grad_()
    x, w, b = (
        torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((3, 2), (4, 2), (4,))
    )
    target = torch.tensor([3, -100, 0])
    how = dict(reduction=reduction, label_smoothing=0.2, backend=kernel, **options)
    assert torch.autograd.gradcheck(lambda z: GF.cross_entropy(z, target, **how), [logits])

    def head(x, w, b):
        return GF.linear_cross_entropy(x, w, target, linear_bias=b, **how)

    assert torch.autograd.gradcheck(head, [x, w, b])


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_ignored_rows_are_exactly_zero_whatever_they_hold(dtype, options, kernel):
    logits = torch.ones(4, 7, dtype=dtype)
    logits[0], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    target = torch.tensor([2, 2, 2, 5])
    impl, how = implementation(kernel), (2, 0.1, options.get("softcap"), options.get("z_loss", 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):  # infinities are what is tested
        loss, lse = impl.forward(logits, target, *how)
        dloss = torch.tensor([torch.inf, torch.nan, 1.0, 1.0], dtype=loss.dtype)
        dlogits = impl.backward(dloss, logits, target, lse, *how)
    assert not loss[:3].any()
    assert not dlogits[:3].any()
    assert loss[3] > 0
    assert dlogits[3].all()


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_a_target_outside_the_vocabulary_is_nan(options, kernel):
    logits, target = torch.randn(3, 6), torch.tensor([6, -1, 3])
    impl, how = (
        implementation(kernel),
        (-100, 0.0, options.get("softcap"), options.get("z_loss", 0)),
    )
    loss, lse = impl.forward(logits, target, *how)
    dlogits = impl.backward(torch.ones(3), logits, target, lse, *how)
    assert loss.isnan().tolist() == [True, True, False]
    assert dlogits.isnan().all(1).tolist() == dlogits.isnan().any(1).tolist() == [True, True, False]


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_reductions_count_the_rows_that_are_not_ignored(options, backend):
    torch.manual_seed(2)
    logits, target = torch.randn(7, 9), torch.tensor([0, -100, 3, 8, -100, 1, 1])
    x, w = torch.randn(7, 4), torch.randn(9, 4)

    def losses(target, **how):
        how = {**options, **how, "backend": backend}
        yield GF.cross_entropy(logits, target, **how), logits
        yield GF.linear_cross_entropy(x, w, target, **how), x @ w.t()

    each = zip(losses(target, reduction="sum"), losses(target), strict=True)
    for (total, z), (mean, _) in each:
        right = loss_rows(z.double(), target, **options).sum()
        torch.testing.assert_close(total.double(), right, rtol=1e-5, atol=0)
        torch.testing.assert_close(mean.double(), right / 5, rtol=1e-5, atol=0)
    ignored = torch.full((7,), -100)
    assert all(total == 0 for total, _ in losses(ignored, reduction="sum"))
    assert all(mean.isnan() for mean, _ in losses(ignored))
    leaf = logits.clone().requires_grad_()
    GF.cross_entropy(leaf, ignored, **options, backend=backend).backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


WRONG = [
    *((dict(softcap=v), f"softcap={v} is not a finite number above 0") for v in (0.0, -1.0)),
    *((dict(softcap=v), f"softcap={v}") for v in (float("inf"), float("nan"))),
    (dict(z_loss=-0.5), "z_loss=-0.5 is not a finite number of at least 0"),
    *((dict(z_loss=v), f"z_loss={v}") for v in (float("inf"), float("nan"))),
]


@pytest.mark.parametrize("options, message", WRONG, ids=named)
def test_values_outside_the_range_are_refused(options, message, backend):
    x, w, target = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message):
        GF.cross_entropy(x, target, **options, backend=backend)
    with pytest.raises(ValueError, match=message):
        GF.linear_cross_entropy(x, w, target, **options, backend=backend)


def test_a_z_loss_wants_class_ids_that_count_alike():
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match=r"z_loss=0.1 with class weights"):
        GF.cross_entropy(logits, target, torch.ones(4), z_loss=0.1)
    with pytest.raises(ValueError, match=r"z_loss=0.1 with class probabilities"):
        GF.cross_entropy(logits, torch.full((3, 4), 0.25), z_loss=0.1)


def test_what_only_torch_does_takes_a_softcap():
    torch.manual_seed(3)
    logits, ids = torch.randn(3, 4) * 5, torch.tensor([0, 1, 3])
    capped = 2.0 * torch.tanh(logits / 2.0)
    weight, share = torch.rand(4), torch.full((3, 4), 0.25)
    for how in (dict(target=ids, weight=weight), dict(target=share), dict(target=share[0])):
        z, right = (logits, capped) if how["target"].dim() != 1 or "weight" in how else (
            logits[0], capped[0])  # fmt: skip
        torch.testing.assert_close(
            GF.cross_entropy(z, **how, softcap=2.0), F.cross_entropy(right, **how)
        )


def test_other_shapes_take_both_options():
    torch.manual_seed(4)
    flat, target = torch.randn(6, 5), torch.tensor([0, 4, -100, 2, 2, 1])
    options = dict(softcap=2.0, z_loss=0.1)
    images = flat.view(2, 3, 5).transpose(1, 2)  # (N, V, d)
    right = GF.cross_entropy(flat, target, **options, backend="torch")
    torch.testing.assert_close(GF.cross_entropy(images, target.view(2, 3), **options), right)
    rows = loss_rows(flat.double(), target, **options).float()
    torch.testing.assert_close(GF.cross_entropy(flat[0], target[0], **options), rows[0])


def test_layers_hand_the_options_on(backend):
    torch.manual_seed(5)
    x, target = torch.randn(5, 8), torch.tensor([0, 6, -100, 2, 2])
    how = dict(softcap=1.5, z_loss=0.1, label_smoothing=0.1, reduction="sum", backend=backend)
    layer = gnn.CrossEntropyLoss(**how)
    assert torch.equal(layer(x, target), GF.cross_entropy(x, target, **how))
    head = gnn.LinearCrossEntropyLoss(8, 7, True, **how)
    right = GF.linear_cross_entropy(x, head.weight, target, linear_bias=head.bias, **how)
    assert torch.equal(head(x, target), right)
    plain = {k: v for k, v in how.items() if k not in ("softcap", "z_loss")}
    assert layer(x, target) != gnn.CrossEntropyLoss(**plain)(x, target)
    assert right != GF.linear_cross_entropy(x, head.weight, target, linear_bias=head.bias, **plain)
