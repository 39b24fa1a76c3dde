"""What holds for every op on every backend beyond its values: refusals, aliasing, odd tensors."""

import pytest
import torch
from equivalence import (
    CASES,
    FORWARD,
    FUNCTIONS,
    GRADIENT,
    KERNELS,
    accepted,
    convert,
    require,
    run,
    tensors,
)

import gptk
import gptk.functional as GF

BACKENDS = ("torch", *KERNELS)
SMALL = {
    "layer_norm": "residual",
    "attention": "odd_causal",
    "gelu": "odd_tanh",
    "linear": "gelu",
    "mlp": "odd",
    "cross_entropy": "odd",
    "linear_cross_entropy": "none",
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return require(request.param, "attention")


def values_of(op, dtype=torch.float32):
    return CASES[op].inputs(dtype=dtype, **CASES[op].CASES[SMALL[op]])


def leaves_of(op, values):
    names = tensors(values, CASES[op].DIFFERENTIABLE)
    return {n: t.clone().requires_grad_() for n, t in names.items()}


def grad_outputs(outputs):
    return [torch.ones_like(o) for o in outputs]


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("op", FUNCTIONS)
def test_gradients_of_leaves_are_their_own(op, backend):
    values = values_of(op)
    leaves = leaves_of(op, values)

    def gradients(differentiate, *inputs):
        result = FUNCTIONS[op](**{**values, **leaves}, backend=backend)
        outputs = list(result) if isinstance(result, tuple) else [result]
        return differentiate(outputs, *inputs, grad_outputs(outputs))

    once = gradients(torch.autograd.grad, list(leaves.values()))
    for _ in range(2):
        gradients(torch.autograd.backward)
        stores = [t.grad.untyped_storage().data_ptr() for t in leaves.values()]
        assert len(set(stores)) == len(stores)
    for name, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaves[name].grad, 2 * gradient, msg=name)


@pytest.mark.parametrize(
    "op, name",
    [(op, n) for op in FUNCTIONS for n, v in values_of(op).items() if torch.is_tensor(v)],
)
def test_a_tensor_on_another_device_is_refused(op, name, backend):
    values = values_of(op)
    if op == "gelu":
        pytest.skip("has one tensor")
    values[name] = values[name].to("meta")
    with pytest.raises((ValueError, gptk.Unsupported)):
        FUNCTIONS[op](**values, backend=backend)


def test_class_weights_on_another_device_are_refused():
    values = values_of("cross_entropy")
    weight = torch.ones(values["input"].shape[1], device="meta")
    with pytest.raises(ValueError, match="weight is on meta"):
        GF.cross_entropy(**values, weight=weight)


@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 1, 3), (2, 2)])
def test_linear_cross_entropy_wants_a_target_for_each_row(shape, backend):
    x, w = torch.ones(2, 3, 4), torch.ones(5, 4)
    target = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target \(.*\) for rows of logits \(2, 3\)"):
        GF.linear_cross_entropy(x, w, target, backend=backend)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_class_ids_of_every_integer_dtype(op, backend):
    values = values_of(op)
    values["target"] = values["target"].clamp(min=0)
    right = FUNCTIONS[op](**values, backend=backend)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64):
        other = {**values, "target": values["target"].to(dtype)}
        assert torch.equal(FUNCTIONS[op](**other, backend=backend), right), dtype
    wrong = (torch.bool, torch.complex64)
    for dtype in (*wrong, torch.float32) if op == "linear_cross_entropy" else wrong:
        other = {**values, "target": values["target"].to(dtype)}
        with pytest.raises(ValueError, match="class ids are integers"):
            FUNCTIONS[op](**other, backend=backend)


@pytest.mark.parametrize("bad", [-1, 33, 2**40])
def test_an_id_outside_the_classes_is_refused(bad, backend):
    values = values_of("cross_entropy")
    values["target"][3] = bad
    with pytest.raises(IndexError, match=f"target {bad} is outside"):
        GF.cross_entropy(**values, backend=backend)


def test_a_row_of_the_mask_is_all_normalised_dimensions(backend):
    torch.manual_seed(0)
    x, r = torch.randn(4, 3, 10), torch.randn(4, 3, 10)
    for dims in (1, 2, 3):
        shape = x.shape[3 - dims :]
        _, h = GF.layer_norm(x, shape, residual=r, dropout_p=0.4, seed=7, backend=backend)
        flat = gptk.random.dropout(x.flatten(3 - dims), 0.4, 7).view_as(x)
        torch.testing.assert_close(h, r + flat)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_autocast_leaves_float64_alone(op, backend):
    values = values_of(op, torch.float64)
    out, grad = run(op, values, backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast_out, cast_grad = run(op, values, backend)
    for a, b in zip(out, cast_out, strict=True):
        assert b.dtype == torch.float64
        assert torch.equal(a, b)
    assert all(torch.equal(grad[n], cast_grad[n]) for n in grad)


@pytest.mark.parametrize("op", ["linear", "mlp", "linear_cross_entropy"])
def test_autocast_does_not_mix_float64_in(op, backend):
    values = values_of(op)
    name = next(n for n in values if n.endswith("weight"))
    wide = {**values, name: values[name].double()}
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"is torch.float64, input is torch.float32"),
    ):
        FUNCTIONS[op](**wide, backend=backend)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_outputs_may_be_changed_in_place(op, backend):
    """Each output by itself: the right gradients, or autograd's own refusal where it is saved."""
    values = values_of(op)

    def gradients(which, change):
        leaves = leaves_of(op, values)
        result = FUNCTIONS[op](**{**values, **leaves}, backend=backend)
        outputs = list(result) if isinstance(result, tuple) else [result]
        changed = change(outputs[which])
        total = sum(o.sum() for i, o in enumerate(outputs) if i != which)
        ((changed * changed).sum() + total).backward()
        return changed.detach(), {n: t.grad for n, t in leaves.items()}

    for which in range(2 if op == "layer_norm" else 1):
        right, exact = gradients(which, lambda y: y * 2 + 1)
        try:
            y, found = gradients(which, lambda y: y.mul_(2).add_(1))
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            # what backward reads: attention's output, and the sum that layer_norm returns
            assert op == "attention" or (op, which) == ("layer_norm", 1)
            continue
        torch.testing.assert_close(y, right)
        for name in exact:
            torch.testing.assert_close(found[name], exact[name])


def test_changing_an_input_before_backward_is_an_error(backend):
    x = torch.randn(2, 3, 8, requires_grad=True)
    w = torch.randn(8, requires_grad=True)
    inner = x * 1
    y = GF.layer_norm(inner, (8,), w, backend=backend)
    inner.add_(1)
    with pytest.raises(RuntimeError, match=r"modified .*inplace"):
        y.sum().backward()


def test_dropout_of_nothing_with_a_tensor_seed():
    for shape in ((0, 8), (3, 0), (2, 0, 5)):
        for seed in (3, torch.tensor(3)):
            assert gptk.functional.dropout(torch.ones(shape), 0.5, seed).shape == shape
        assert gptk.random.keep_mask_definition(3, *shape[-2:], 0.5).shape == shape[-2:]


@pytest.mark.parametrize("weight", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [torch.bfloat16, torch.float32])
def test_norm_parameters_have_gradients_of_their_own_width(weight, bias, backend):
    torch.manual_seed(0)
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    w = None if weight is None else torch.randn(16).to(weight).requires_grad_()
    b = torch.zeros(16, dtype=bias, requires_grad=True)
    dy = torch.randn(64, 16, dtype=torch.bfloat16)
    GF.layer_norm(x, (16,), w, b, backend=backend).backward(dy)
    exact = dy.double().sum(0)
    assert b.grad.dtype == bias
    assert (b.grad - exact).abs().max() <= (1e-5 if bias == torch.float32 else 0.1)
    if w is not None:
        xhat = torch.nn.functional.layer_norm(x.double(), (16,))
        assert w.grad.dtype == weight
        error = (w.grad - (dy.double() * xhat).sum(0)).abs().max()
        assert error <= (1e-4 if weight == torch.float32 else 0.1)


def test_attention_without_heads_or_columns(backend):
    def attend(q, k, v, **options):
        return GF.attention(torch.ones(q), torch.ones(k), v, backend=backend, **options)

    none = torch.ones(2, 0, 3, 4)
    assert attend(none.shape, none.shape, none).shape == none.shape
    heads = torch.ones(2, 4, 5, 6)
    shape = attend((2, 0, 3, 4), (2, 4, 5, 4), heads, enable_gqa=True).shape
    assert shape == (2, 0, 3, 6)
    with pytest.raises(ValueError, match="3 query heads for 0 key heads"):
        attend((2, 3, 3, 4), none.shape, none, enable_gqa=True)
    v = torch.randn(2, 2, 5, 3)
    y = attend((2, 2, 4, 0), (2, 2, 5, 0), v)  # every score is 0: the mean
    torch.testing.assert_close(y, v.mean(2, keepdim=True).expand(2, 2, 4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_mlp_without_activation(dtype, backend):
    values = {**CASES["mlp"].inputs(dtype=dtype, **CASES["mlp"].CASES["odd"]), "activation": None}
    exact, exact_grad = run("mlp", convert(values, torch.float64), "torch")
    torchs, torch_grad = run("mlp", values, "torch")
    out, grad = run("mlp", values, backend)
    assert accepted(out[0], exact[0], torchs[0], FORWARD)
    for name, right in exact_grad.items():
        assert accepted(grad[name], right, torch_grad[name], GRADIENT), name


def test_a_head_without_classes(backend):
    x, w = torch.ones(3, 4, requires_grad=True), torch.ones(0, 4, requires_grad=True)
    ignored = torch.full((3,), -100)
    loss = GF.linear_cross_entropy(x, w, ignored, reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros(3, 4))
    with pytest.raises(IndexError):
        GF.linear_cross_entropy(x, w, ignored.zero_(), backend=backend)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_inputs_and_gradients_with_a_pending_negation(op, backend):
    values = values_of(op)
    out, _ = run(op, values, backend)
    ups = [torch.randn(o.shape) for o in out]
    _, grad = run(op, values, backend, upstream=ups)
    lazy = {
        k: torch._neg_view(-v) if torch.is_tensor(v) and v.dim() else v for k, v in values.items()
    }
    lazy_out, lazy_grad = run(op, lazy, backend, upstream=[torch._neg_view(-u) for u in ups])
    for a, b in zip(out, lazy_out, strict=True):
        assert torch.equal(a, b)
    for name in grad:
        assert torch.equal(grad[name], lazy_grad[name]), name


def test_an_unused_norm_leaves_its_parameters_without_gradient(backend):
    values = leaves_of("layer_norm", values_of("layer_norm"))
    shape = values["weight"].shape
    _, h = GF.layer_norm(normalized_shape=shape, **values, backend=backend)
    h.sum().backward()
    assert values["weight"].grad is None
    assert values["bias"].grad is None
    assert torch.equal(values["input"].grad, torch.ones_like(h))
    assert torch.equal(values["residual"].grad, torch.ones_like(h))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_inside_torch_func_the_reference_runs_or_the_call_is_refused(op, backend):
    values = convert(values_of(op), torch.float64)
    name = CASES[op].DIFFERENTIABLE[0]

    def loss(x, backend):
        return first(FUNCTIONS[op](**{**values, name: x}, backend=backend)).sum()

    if backend != "torch":
        with pytest.raises(gptk.Unsupported, match="take backend='torch'"):
            torch.func.grad(loss)(values[name], backend)
        return
    x = values[name].clone().requires_grad_()
    (exact,) = torch.autograd.grad(loss(x, "torch"), x)
    for chosen in ("torch", "auto"):
        torch.testing.assert_close(torch.func.grad(loss)(values[name], chosen), exact)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_losses_trace_and_map_without_reading_the_ids(op):
    values = values_of(op)
    right = FUNCTIONS[op](**values, backend="torch")

    def loss(target):
        return FUNCTIONS[op](**{**values, "target": target}, backend="torch")

    traced = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(values["target"]), right)
    mapped = torch.func.vmap(loss)(torch.stack([values["target"]] * 2))
    torch.testing.assert_close(mapped, torch.stack([right] * 2))
