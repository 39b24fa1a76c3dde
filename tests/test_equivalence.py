"""Every op x backend x dtype x case: the backends compute the reference's function."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from equivalence import (
    CASES,
    DTYPES,
    FORWARD,
    FUNCTIONS,
    GRADIENT,
    KERNELS,
    accepted,
    convert,
    error,
    magnitude,
    missing,
    noise,
    run,
    tensors,
    wrong_answers,
)

from gptk import native
from gptk.ops.adamw import adamw_
from gptk.random import round_stochastically

ALL = [(op, case) for op in FUNCTIONS for case in CASES[op].CASES]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def need(op: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
    reason = missing(op, backend, dtype)
    if reason:
        pytest.skip(reason)


def torch_itself(op, case, values, dtype):
    """Torch's outputs and gradients in dtype.

    In float64 torch is the oracle, so its error there is what its float32 error predicts: the
    largest of three draws of the case, twice, since the oracle makes it too.
    """
    out, grad = run(op, values, "torch")
    if dtype != torch.float64:
        return out, grad
    scale = 2 * 2.0**-29  # unit roundoff of float64 over that of float32
    out_error, grad_error = [0.0] * len(out), dict.fromkeys(grad, 0.0)
    for seed in range(3):
        single = CASES[op].inputs(dtype=torch.float32, seed=seed, **CASES[op].CASES[case])
        rough_out, rough = run(op, single, "torch")
        fine_out, fine = run(op, convert(single, torch.float64), "torch")
        found = [error(a, b) for a, b in zip(rough_out, fine_out, strict=True)]
        out_error = [max(pair) for pair in zip(out_error, found, strict=True)]
        grad_error = {n: max(grad_error[n], error(rough[n], fine[n])) for n in grad}
    out = [y + scale * e for y, e in zip(out, out_error, strict=True)]
    return out, {n: grad[n] + scale * grad_error[n] for n in grad}


@contextlib.contextmanager
def instruction_set(level):
    """The extension's code for another CPU; "" leaves the one in use."""
    before = native.isa() if level else ""
    try:
        if level:
            native.load().select_isa(level)
        yield
    finally:
        if level:
            native.load().select_isa(before)


LOWER = [f"cpp@{level}" for level in native.isa_levels()[:-1]] if native.available() is None else []


@pytest.mark.parametrize("backend", [*KERNELS, *LOWER])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("op, case", ALL)
def test_forward_and_every_gradient_match_the_reference(op, case, dtype, backend):
    backend, _, level = backend.partition("@")
    need(op, backend, dtype)
    with instruction_set(level):
        if level:
            assert native.isa() == level
        matches_the_reference(op, case, dtype, backend)


def matches_the_reference(op, case, dtype, backend):
    values = CASES[op].inputs(dtype=dtype, **CASES[op].CASES[case])
    exact_out, exact_grad = run(op, convert(values, torch.float64), "torch")
    torch_out, torch_grad = torch_itself(op, case, values, dtype)
    out, grad = run(op, values, backend)
    for y, exact, torchs in zip(out, exact_out, torch_out, strict=True):
        assert y.dtype == torchs.dtype
        assert accepted(y, exact, torchs, FORWARD), (
            f"output error {error(y, exact):.3g}, torch's own {error(torchs, exact):.3g}, "
            f"noise {noise(exact, y.dtype):.3g}"
        )
    largest = magnitude(exact_grad.values())
    for name, exact in exact_grad.items():
        g, torchs = grad[name], torch_grad[name]
        assert g.dtype == values[name].dtype
        assert accepted(g, exact, torchs, GRADIENT, largest), (
            f"d{name} error {error(g, exact):.3g}, torch's own {error(torchs, exact):.3g}, "
            f"noise {noise(exact, g.dtype):.3g}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("op, case", ALL)
def test_the_gate_rejects_wrong_answers(op, case, dtype):
    values = CASES[op].inputs(dtype=dtype, **CASES[op].CASES[case])
    exact_out, exact_grad = run(op, convert(values, torch.float64), "torch")
    torch_out, torch_grad = run(op, values, "torch")
    checks = list(zip(exact_out, torch_out, itertools.repeat(FORWARD)))
    checks += [(exact_grad[n], torch_grad[n], GRADIENT) for n in exact_grad]
    rejected = 0
    for exact, torchs, factor in checks:
        for name, wrong in wrong_answers(exact).items():
            if error(wrong, exact) <= 2.0 ** (-6 if dtype.itemsize == 2 else -18) * (
                1.0 + exact.abs().max().item()
            ):
                continue  # the wrong answer is the right one here: a gradient that is 0, say
            assert not accepted(wrong.to(torchs.dtype), exact, torchs, factor), name
            rejected += 1
    assert rejected >= 3


SUBSET_CASES = [
    ("layer_norm", "residual_dropout"),
    ("layer_norm", "odd"),
    ("attention", "odd_full"),
    ("linear", "gelu_tanh"),
    ("mlp", "odd"),
    ("linear_cross_entropy", "smoothing"),
    ("linear_cross_entropy", "softcap_z_loss"),
]
MIXED_CASES = [
    *SUBSET_CASES,
    ("gelu", "odd_tanh"),
    ("cross_entropy", "none"),
    ("cross_entropy", "softcap_z_loss"),
]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("op, case", SUBSET_CASES)
def test_every_subset_of_required_gradients(op, case, backend):
    need(op, backend)
    values = CASES[op].inputs(dtype=torch.float32, **CASES[op].CASES[case])
    full_out, full = run(op, values, backend)
    names = tuple(full)
    for size in range(len(names)):
        for subset in itertools.combinations(names, size):
            out, grads = run(op, values, backend, required=subset)
            assert all(torch.equal(a, b) for a, b in zip(out, full_out, strict=True))
            for name in names:
                if name in subset:
                    assert torch.equal(grads[name], full[name]), (subset, name)
                else:
                    assert grads[name] is None, (subset, name)


@pytest.mark.parametrize("pair", [("cpp", "triton"), ("triton", "cpp")], ids="-".join)
@pytest.mark.parametrize("op, case", MIXED_CASES)
def test_forward_by_one_backend_and_backward_by_another(op, case, pair, monkeypatch):
    import importlib

    for backend in pair:
        need(op, backend)
    ahead, back = (importlib.import_module(f"gptk.ops.{op}.{b}_impl") for b in pair)
    mixed = SimpleNamespace(forward=ahead.forward, backward=back.backward, __name__="mixed")
    values = CASES[op].inputs(dtype=torch.float32, **CASES[op].CASES[case])
    exact_out, exact_grad = run(op, convert(values, torch.float64), "torch")
    torch_out, torch_grad = run(op, values, "torch")
    module = importlib.import_module(f"gptk.ops.{op}")
    monkeypatch.setattr(module, "resolve", lambda *args, **kwargs: mixed)
    out, grad = run(op, values, "cpp")
    for y, exact, torchs in zip(out, exact_out, torch_out, strict=True):
        assert accepted(y, exact, torchs, FORWARD)
    for name, exact in exact_grad.items():
        assert accepted(grad[name], exact, torch_grad[name], GRADIENT), name


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values with other strides and an offset, every second element of a buffer."""
    if not t.is_floating_point() and t.dim() == 0:
        return t
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 2, dtype=t.dtype)
    view = wide[..., 1 : 1 + 2 * t.shape[-1] : 2]
    view.copy_(t)
    if view.dim() >= 2:  # and the first axis innermost
        view = view.movedim(0, -1).contiguous().movedim(-1, 0)
    return view


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "op, case", [(op, "odd_causal" if op == "attention" else "odd") for op in FUNCTIONS]
)
def test_any_layout_of_inputs_and_gradients(op, case, backend):
    need(op, backend)
    values = CASES[op].inputs(dtype=torch.float32, **CASES[op].CASES[case])
    out, grad = run(op, values, backend)
    other = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    ups = [strided(torch.randn(o.shape)) if o.dim() else torch.randn(()) for o in out]
    plain_out, plain = run(op, values, backend, upstream=[u.contiguous() for u in ups])
    odd_out, odd = run(op, other, backend, upstream=ups)
    for a, b in zip(plain_out, odd_out, strict=True):
        assert torch.equal(a, b)
    for name in plain:
        assert torch.equal(plain[name], odd[name]), name
    ones = [torch.ones(()).expand(o.shape) for o in out]
    _, expanded = run(op, values, backend, upstream=ones)
    _, dense = run(op, values, backend, upstream=[o.contiguous() for o in ones])
    for name in dense:
        assert torch.equal(dense[name], expanded[name]), name


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_inputs_stay_as_they_were_and_results_repeat(op, backend):
    need(op, backend)
    case = list(CASES[op].CASES)[-1]
    values = CASES[op].inputs(dtype=torch.float32, **CASES[op].CASES[case])
    held = tensors(values, tuple(values))
    copies = {k: (t.clone(), t._version) for k, t in held.items()}
    first_out, first = run(op, values, backend)
    second_out, second = run(op, values, backend)
    for k, t in held.items():
        assert torch.equal(t, copies[k][0]), k
        assert t._version == copies[k][1], k
    assert all(torch.equal(a, b) for a, b in zip(first_out, second_out, strict=True))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "op, name", [(op, n) for op in FUNCTIONS for n in CASES[op].DIFFERENTIABLE]
)
def test_one_nan_reaches_what_the_reference_says(op, name, backend):
    need(op, backend)
    case = {"attention": "odd_causal", "layer_norm": "residual_dropout"}.get(op, "odd")
    if op == "linear_cross_entropy" or (op == "cross_entropy"):
        case = "none"
    values = CASES[op].inputs(dtype=torch.float32, **CASES[op].CASES[case])
    if not isinstance(values.get(name), torch.Tensor):
        pytest.skip(f"the case {case} has no {name}")
    spoiled = values[name].clone()
    spoiled.view(-1)[spoiled.numel() // 2] = torch.nan
    values[name] = spoiled
    exact, _ = run(op, convert(values, torch.float64), "torch", required=())
    out, _ = run(op, values, backend, required=())
    for y, reference in zip(out, exact, strict=True):
        assert torch.equal(y.isnan(), reference.isnan())


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(backend):
    e, t = torch.empty, torch.ones
    none = torch.empty(0, dtype=torch.int64)
    qkv = ("query", "key", "value")
    for op, values, shape in [
        ("layer_norm", dict(input=e(1, 0, 10), normalized_shape=(10,), weight=t(10)), (1, 0, 10)),
        ("attention", dict.fromkeys(qkv, e(1, 2, 0, 8)), (1, 2, 0, 8)),
        ("attention", dict.fromkeys(qkv, e(0, 2, 4, 8)) | {"causal": True}, (0, 2, 4, 8)),
        ("attention", dict.fromkeys(qkv, e(1, 2, 0, 8)) | {"query": t(1, 2, 3, 8)}, (1, 2, 3, 8)),
        ("gelu", dict(input=e(0, 3072)), (0, 3072)),
        ("linear", dict(input=e(0, 8), weight=t(4, 8), bias=t(4), activation="gelu"), (0, 4)),
        (
            "mlp",
            dict(
                input=e(2, 0, 8),
                fc_weight=t(4, 8),
                fc_bias=None,
                proj_weight=t(8, 4),
                proj_bias=None,
            ),
            (2, 0, 8),
        ),
        ("cross_entropy", dict(input=e(0, 5), target=none, reduction="none"), (0,)),
        ("cross_entropy", dict(input=e(0, 5), target=none, reduction="sum"), ()),
        (
            "linear_cross_entropy",
            dict(input=e(0, 5), linear_weight=t(3, 5), target=none, reduction="sum"),
            (),
        ),
    ]:
        need(op, backend)
        out, grads = run(op, values, backend)
        assert out[0].shape == shape, op
        assert not out[0].isnan().any(), op
        for name, grad in grads.items():
            assert grad is not None, (op, name)
            assert torch.equal(grad, torch.zeros_like(values[name])), (op, name)


def adamw_after(values, backend):
    """name -> what one update leaves there, all parameters in one; `values` stay as they are."""
    copies = {
        k: [t if t is None else t.clone() for t in v] if isinstance(v, list) else v
        for k, v in values.items()
    }
    norm, _ = adamw_(**copies, backend=backend)
    assert [int(t) for t in copies["step"]] == [int(t) + 1 for t in values["step"]]
    if norm is not None:  # n squares and their sum: each rounded once, in any order
        scale = 1.0 if values.get("grad_scale") is None else float(values["grad_scale"])
        exact = torch.cat([g.double().flatten() for g in values["grads"]]) / scale
        assert abs(norm - exact.norm()) <= (exact.numel() + 2) * 2.0**-52 * exact.norm()
    copies["kept"] = copies["masters"] or copies["params"]
    names = ("kept", "params", "exp_avgs", "exp_avg_sqs")
    return {name: torch.cat([t.flatten() for t in copies[name]]) for name in names}


def adamw_in(values, dtype):
    """The same parameters (their masters, where they have some), moments and gradients in dtype."""
    lists = {**values, "params": values["masters"] or values["params"], "masters": None}
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        lists[name] = [t.to(dtype) for t in lists[name]]
    return lists


@pytest.mark.parametrize("backend", ["torch", *KERNELS, *LOWER])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("case", CASES["adamw"].CASES)
def test_an_update_matches_the_reference(case, dtype, backend):
    backend, _, level = backend.partition("@")
    need("adamw", backend, dtype)
    values = CASES["adamw"].inputs(dtype=dtype, **CASES["adamw"].CASES[case])
    with instruction_set(level):
        if values["stochastic_rounding"] and dtype == torch.float16:
            with pytest.raises(ValueError, match="float16"):
                adamw_(**values, backend=backend)
        elif values["stochastic_rounding"] and dtype == torch.bfloat16:
            is_rounded_by_its_random_bits(values, backend)
        else:
            update_matches_the_reference(values, dtype, backend)


def update_matches_the_reference(values, dtype, backend):
    exact = adamw_after(adamw_in(values, torch.float64), "torch")
    single = adamw_after(adamw_in(values, torch.float32), "torch")
    for name, y in adamw_after(values, backend).items():
        right, own = exact[name], single[name]
        if y.dtype == torch.float64:  # the oracle's own precision: float32's error, made twice
            own = right + 2 * 2.0**-29 * error(own, right)
        own = own.to(y.dtype)
        assert accepted(y, right, own, FORWARD), (name, error(y, right), error(own, right))
        for wrong in wrong_answers(right).values():
            assert not accepted(wrong.to(y.dtype), right, own, FORWARD), name


def is_rounded_by_its_random_bits(values, backend):
    """Rounding is monotonic, so the result lies between what the ends of the interval that holds
    the float32 value round to, and is known wherever those agree."""
    exact, single = (
        adamw_after(adamw_in(values, d), "torch")["kept"] for d in (torch.float64, torch.float32)
    )
    limit = FORWARD * error(single, exact) + noise(exact, torch.float32)
    sizes = [p.numel() for p in values["params"]]
    known = rejected = 0
    found = adamw_after(values, backend)["kept"].float()
    for row, (y, right) in enumerate(zip(found.split(sizes), exact.split(sizes), strict=True)):
        t = int(values["step"][row]) + 1
        low, high = (
            round_stochastically((right + d).float(), values["seed"], row, t).float()
            for d in (-limit, limit)
        )
        assert bool(((low <= y) & (y <= high)).all())
        known += int((low == high).sum())
        others = [right.float().bfloat16()]
        others += [
            round_stochastically(right.float(), *key)
            for key in ((0, row, t), (values["seed"], row + 1, t), (values["seed"], row, t + 1))
        ]
        if y.numel() > 1000:
            rejected += sum(not bool(((low <= x) & (x <= high)).all()) for x in others)
    assert rejected == len(others)
    assert known >= 0.99 * found.numel()
