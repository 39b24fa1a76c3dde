"""Failures of other projects' kernels (norm, activation, loss): right here, on every backend."""

import math

import pytest
import torch
from equivalence import missing

import gptk.functional as GF
from gptk import nn as gnn

F64 = torch.float64


@pytest.fixture(params=["torch", "cpp", "triton"])
def backend(request):
    reason = missing("layer_norm", request.param)
    if reason:
        pytest.skip(reason)
    return request.param


def near(value, right, tol):
    value, right = torch.as_tensor(value).detach().double(), torch.as_tensor(right).double()
    assert value.shape == right.shape
    assert not value.isnan().any()
    assert (value - right).abs().max().item() <= tol


def far(value, right, tol):
    """The reported wrong answer would be noticed."""
    difference = (torch.as_tensor(value).double() - torch.as_tensor(right).double()).abs()
    assert difference.isnan().any() or difference.max().item() > tol


def norms(x, backend, weight=None, bias=None, eps=1e-5):
    """Through the function and through the module."""
    n = x.shape[-1]
    yield GF.layer_norm(x, (n,), weight, bias, eps, backend=backend)
    layer = gnn.LayerNorm(n, eps=eps, elementwise_affine=weight is not None, backend=backend)
    if weight is not None:
        layer.load_state_dict({"weight": weight, "bias": bias})
    yield layer.to(x.dtype)(x)


def test_N2_statistics_of_rows_far_from_zero(shown, backend):
    case = shown.N2()
    for name, right in case["expect"].items():
        for y in norms(case["inputs"][name], backend):
            near(y, right, 0.0 if name != "rows" else case["tol"])


@pytest.mark.parametrize("width", [3, 100, 257, 1000])
@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_statistics_hold_at_any_offset(backend, width, mean):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width)) + mean
    right = torch.nn.functional.layer_norm(x.double(), (width,))
    std = x.double().std(-1, correction=0)
    bound = (4 * 2.0**-24 * mean / std + 2e-6)[:, None]
    y = GF.layer_norm(x, (width,), backend=backend)
    assert ((y.double() - right).abs() <= bound).all()


def test_a_constant_row_gives_exactly_the_bias(backend):
    constants = torch.tensor([0.1, -3.7, 1234.5, 9.9e6])
    for width in (1, 2, 7, 64, 100, 300):
        bias = torch.linspace(-1, 1, width)
        x = constants[:, None].expand(4, width)
        y = GF.layer_norm(x, (width,), torch.ones(width), bias, backend=backend)
        assert torch.equal(y, bias.expand(4, width)), width


def test_N3_widths_that_are_no_power_of_two(shown, backend):
    case = shown.N3()
    for n, x in case["inputs"].items():
        for y in norms(x, backend):
            near(y, case["expect"][n], case["tol"])
        far(case["wrong"][n], case["expect"][n], case["tol"])


def test_N6_every_gradient_of_add_and_norm(shown, backend):
    case = shown.N6()
    i, right = case["inputs"], case["expect"]
    leaf = {n: i[n].float().requires_grad_() for n in ("x", "residual", "weight", "bias")}
    y = GF.layer_norm(leaf["x"], (6,), leaf["weight"], leaf["bias"], backend=backend)
    y.backward(i["dy"].float())
    for name, key in (("x", "dx"), ("weight", "dw"), ("bias", "db")):
        near(leaf[name].grad, right["ln"][key], case["tol"])
    for both, key in ((True, "add_ln"), (False, "add_ln_only_y_used")):
        for t in leaf.values():
            t.grad = None
        y, h = GF.layer_norm(
            leaf["x"],
            (6,),
            leaf["weight"],
            leaf["bias"],
            residual=leaf["residual"],
            backend=backend,
        )
        outs, ups = ([y, h], [i["dy"], i["d_residual_out"]]) if both else ([y], [i["dy"]])
        torch.autograd.backward(outs, [u.float() for u in ups])
        near(leaf["x"].grad, right[key]["dx"], case["tol"])
        near(leaf["residual"].grad, right[key]["dresidual"], case["tol"])
        near(leaf["weight"].grad, right["add_ln"]["dw"], case["tol"])
        near(leaf["bias"].grad, right["add_ln"]["db"], case["tol"])
    far(case["wrong"]["add_ln_dx"], right["add_ln"]["dx"], case["tol"])


@pytest.mark.parametrize("rows", [1, 2, 5, 33, 130])
def test_db_of_ones_is_the_row_count(backend, rows):
    bias = torch.zeros(9, requires_grad=True)
    y = GF.layer_norm(torch.randn(rows, 9), (9,), torch.ones(9), bias, backend=backend)
    y.backward(torch.ones_like(y))
    assert torch.equal(bias.grad, torch.full((9,), float(rows)))


def test_N8_nobody_writes_to_the_upstream_gradient(shown, backend):
    case = shown.N8()
    i = case["inputs"]
    ops = {
        "layer_norm": lambda x: GF.layer_norm(x, (4,), backend=backend),
        "gelu_tanh": lambda x: GF.gelu(x, "tanh", backend=backend),
    }
    for name, op in ops.items():
        x1, x2 = (i[k].float().requires_grad_() for k in ("x1", "x2"))
        dz = i["dz"].float()
        (op(x1) + op(x2)).backward(dz)
        near(x1.grad, case["expect"][name]["dx1"], case["tol"])
        near(x2.grad, case["expect"][name]["dx2"], case["tol"])
        assert torch.equal(dz, i["dz"].float())


def test_N10_double_backward_is_right_or_refused(shown, backend):
    case = shown.N10()
    i, right = case["inputs"], case["expect"]
    x = i["x"].clone().requires_grad_()
    t = torch.tensor([i["gelu_x"]], dtype=F64, requires_grad=True)
    y, z = GF.layer_norm(x, (4,), backend=backend), GF.gelu(t, "tanh", backend=backend)
    if backend != "torch":
        for out, leaf in ((y * i["c"], x), (z, t)):
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(out.sum(), leaf, create_graph=True)
        return
    (g,) = torch.autograd.grad((y * i["c"]).sum(), x, create_graph=True)
    near(g, right["ln_first"], case["tol"])
    (gg,) = torch.autograd.grad((g * g).sum(), x)
    near(gg, right["ln_grad_of_squared_grad"], case["tol"])
    (h,) = torch.autograd.grad(z, t, create_graph=True)
    (hh,) = torch.autograd.grad(h, t)
    near(hh, right["gelu_second"].reshape(1), case["tol"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_M2_gelu_far_out(shown, backend, dtype):
    case = shown.M2()
    x = case["inputs"]["x"].to(dtype)
    x = x[x.isfinite()]
    for approximate in ("tanh", "none"):
        leaf = x.clone().requires_grad_()
        y = gnn.GELU(approximate, backend=backend)(leaf)
        y.sum().backward()
        assert y.isfinite().all()
        assert leaf.grad.isfinite().all()
        out = x.abs() >= 30  # nearer, the true tail is a tiny number
        assert torch.equal(y.detach()[out], x[out].relu())
        assert torch.equal(leaf.grad[out], (x[out] > 0).to(dtype))
    if dtype == torch.float32:
        v = case["inputs"]["variants_x"]
        near(GF.gelu(v, "tanh", backend=backend), case["expect"]["gelu_tanh"], case["tol"])
        near(GF.gelu(v, backend=backend), case["expect"]["gelu_erf"], case["tol"])
        far(case["expect"]["gelu_erf"], case["expect"]["gelu_tanh"], case["tol"])
        leaf = case["inputs"]["x"].clone().requires_grad_()
        GF.gelu(leaf, "tanh", backend=backend).sum().backward()
        near(leaf.grad, case["expect"]["dgelu_tanh"], case["tol"])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_infinities_and_nan(backend, approximate):
    x = torch.tensor([-math.inf, math.inf, math.nan], requires_grad=True)
    y = GF.gelu(x, approximate, backend=backend)
    assert y[0] == 0
    assert y[1] == math.inf
    assert y[2].isnan()


def test_L2_each_token_has_its_own_upstream_gradient(shown, backend):
    case = shown.L2()
    i, right = case["inputs"], case["expect"]
    logits = i["logits"].float().requires_grad_()
    loss = GF.cross_entropy(logits, i["target"], reduction="none", backend=backend)
    near(loss, right["loss_none"], case["tol"])
    upstream = i["upstream_base"].float()[::2]
    loss.backward(upstream)
    near(logits.grad, right["dlogits"], case["tol"])
    assert not logits.grad[i["target"] == -100].any()
    near(GF.cross_entropy(logits, i["target"], backend=backend), right["mean"], case["tol"])
    for wrong in case["wrong"].values():
        far(wrong, right["dlogits"], case["tol"])

    eye = torch.eye(5).requires_grad_()  # the head that makes the input the logits
    x = i["logits"].float().requires_grad_()
    bias = torch.zeros(5, requires_grad=True)
    loss = GF.linear_cross_entropy(
        x, eye, i["target"], linear_bias=bias, reduction="none", backend=backend
    )
    loss.backward(upstream)
    near(loss, right["loss_none"], case["tol"])
    near(x.grad, right["dlogits"], case["tol"])
    near(eye.grad, right["dlogits"].T @ i["logits"], 10 * case["tol"])
    near(bias.grad, right["dlogits"].sum(0), case["tol"])


def test_L4_sums_are_not_kept_in_16_bits(shown, backend):
    case = shown.L4()
    i, right = case["inputs"], case["expect"]
    w = i["w"].clone().requires_grad_()
    loss = GF.linear_cross_entropy(i["x"], w, i["target"], backend=backend)
    loss.backward()
    near(w.grad, right["dw"], case["tol"]["dw"])
    near(loss, torch.tensor(right["loss"]), right["loss"] * 2.0**-8)
    x = torch.randn(4096, 8).bfloat16()
    weight = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    y = GF.layer_norm(x, (8,), weight, bias, backend=backend)
    y.backward(torch.full_like(y, 2.0**-10))
    near(bias.grad, torch.full((8,), right["ln_db"]), case["tol"]["ln_db"])


def test_L5_bad_and_ignored_targets(shown, backend):
    case = shown.L5()
    i = case["inputs"]
    logits = i["logits"].float().requires_grad_()
    ignored = i["all_ignored"]
    eye = torch.eye(5)
    losses = [
        lambda **k: GF.cross_entropy(logits, backend=backend, **k),
        lambda **k: GF.linear_cross_entropy(logits, eye, backend=backend, **k),
    ]
    for loss in losses:
        logits.grad = None
        assert loss(target=ignored).isnan()
        loss(target=ignored).backward()
        assert torch.equal(logits.grad, torch.zeros_like(logits))
        assert loss(target=ignored, reduction="sum") == 0
        assert torch.equal(loss(target=ignored, reduction="none"), torch.zeros(4))
        for bad in i["bad"]:
            with pytest.raises((IndexError, ValueError), match=str(bad[-1])):
                loss(target=torch.tensor(bad), ignore_index=i["bad_ignore_index"])


def test_L6_the_loss_does_not_need_a_gradient(shown, backend):
    case = shown.L6()
    i = case["inputs"]
    logits, target = i["logits"].float(), torch.tensor(i["target"])
    eye = torch.eye(3)

    def both():
        yield GF.cross_entropy(logits, target, backend=backend)
        yield GF.linear_cross_entropy(logits, eye, target, backend=backend)
        yield gnn.CrossEntropyLoss(backend=backend)(logits, target)
        head = gnn.LinearCrossEntropyLoss(3, 3, backend=backend)
        with torch.no_grad():
            head.weight.copy_(eye)
        yield head(logits, target)

    for state in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with state:
            for loss in both():
                near(loss, case["expect"]["loss"], case["tol"])
    for needs in ((True, False), (False, True)):
        x, w = logits.clone().requires_grad_(needs[0]), eye.clone().requires_grad_(needs[1])
        loss = GF.linear_cross_entropy(x, w, target, backend=backend)
        loss.backward()
        near(loss, case["expect"]["loss"], case["tol"])
        assert (x.grad is not None, w.grad is not None) == needs
