"""Every combination of flags that an op allows, by its Triton kernels, at one small odd size.

Judged as in test_equivalence.py: outputs and gradients against the reference in float64. Each flag
is then put back to its default in the reference, which must be another answer: a flag that a kernel
drops is seen.
"""

import itertools
import math

import pytest
import torch
from equivalence import (
    CASES,
    FORWARD,
    GRADIENT,
    convert,
    error,
    magnitude,
    require,
    run,
)
from interpreter_checks import needs_interpreter, overflow_checks
from test_equivalence import is_rounded_by_its_random_bits, update_matches_the_reference

from gptk.bench.gate import bound
from gptk.ops.adamw import adamw_

pytestmark = needs_interpreter
FLAGS = {
    "attention": dict(causal=False, window=None, dropout_p=0.0),
    "layer_norm": dict(residual=None, dropout_p=0.0, weight=None, bias=None),
    "gelu": dict(approximate="none"),
    "linear": dict(activation=None, bias=None),
    "mlp": dict(activation=None, fc_bias=None, proj_bias=None),
    "cross_entropy": dict(reduction="sum", label_smoothing=0.0, softcap=None, z_loss=0.0),
    "linear_cross_entropy": dict(
        reduction="sum", label_smoothing=0.0, softcap=None, z_loss=0.0, linear_bias=None
    ),
}
"""Flag -> the value at which it does nothing."""


@pytest.fixture(autouse=True)
def _overflows_are_errors():
    with overflow_checks():
        yield


def check(op, used=None, slack=lambda exact: 0.0, sum_slack=0.0, **values):
    """Judge one call.

    Args:
        used: factors of the outputs' gradients, all of them 1 by default.
        slack: what a gradient may be off beside the gate, by the method's error analysis.
        sum_slack: the same of an output, in its own units of rounding.
    """
    require("triton", op)
    wide = convert(values, torch.float64)
    ups = None
    if used is not None:
        shapes = [o.shape for o in run(op, values, "torch", required=())[0]]
        ups = [
            torch.linspace(-1, 2, s.numel()).view(s) * u for s, u in zip(shapes, used, strict=True)
        ]
    out, grad = run(op, values, "triton", upstream=ups)
    exact_out, exact_grad = run(op, wide, "torch", upstream=ups)
    own_out, own_grad = run(op, values, "torch", upstream=ups)
    limits = []
    for y, exact, own in zip(out, exact_out, own_out, strict=True):
        assert y.dtype == own.dtype
        limit = bound(y, exact, error(own, exact), FORWARD)
        limits.append(limit + sum_slack * torch.finfo(y.dtype).eps * magnitude([exact]))
        assert error(y, exact) <= limits[-1], (error(y, exact), limits[-1])
    largest = magnitude(exact_grad.values())
    for name, exact in exact_grad.items():
        g, own = grad[name], own_grad[name]
        assert g.dtype == values[name].dtype
        limit = bound(g, exact, error(own, exact), GRADIENT, largest) + slack(exact)
        assert error(g, exact) <= limit, (name, error(g, exact), limit)
    for flag, default in FLAGS[op].items():
        if flag not in values or values[flag] is default or values[flag] == default:
            continue
        also = {"causal": {"window": None}, "residual": {"dropout_p": 0.0}}.get(flag, {})
        other, _ = run(op, {**wide, flag: default, **also}, "torch", required=())
        pairs = zip(out, other, limits, strict=False)  # without a residual there is one output
        assert any(error(y, o) > limit for y, o, limit in pairs), f"{flag} has no effect"


LENGTHS = {  # (queries, keys) or, packed, those of each document
    "square": (17, 17),
    "more keys": (17, 20),
    "more queries": (20, 17),
    "decode": (3, 33),
    "packed": ((6, 0, 9, 1), None),
    "packed, other keys": ((6, 0, 9, 1), (9, 5, 2, 1)),
}


@pytest.fixture
def _small_tiles(monkeypatch):
    """Tiles of 16 x 16 and parts of 16 keys, so that short sequences have several."""
    from test_attention_triton import use_tiles

    from gptk.ops.attention import triton_decode

    use_tiles(monkeypatch, 16, 16)
    monkeypatch.setattr(triton_decode, "LEAST_KEYS", 16)
    monkeypatch.setattr(triton_decode, "launch_config", lambda *_: (16, 16, 4, 1))


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("heads", [1, 2], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_attention(lengths, mask, heads, dropout_p):
    queries, keys = LENGTHS[lengths]
    packed = lengths.startswith("packed")
    sizes = dict(q_lengths=queries, k_lengths=keys) if packed else {}
    Tq = sum(queries) if packed else queries
    Tk = sum(keys or queries) if packed else keys
    values = CASES["attention"].inputs(
        B=1, H=heads, Hkv=1, Tq=Tq, Tk=Tk, D=5, Dv=3, dtype=torch.float32,
        causal=mask != "full", window=4 if mask == "window" else None, dropout_p=dropout_p,
        scale=None if heads == 1 else 0.9, **sizes,
    )  # fmt: skip
    q, k, v = (values[name].abs().amax() for name in ("query", "key", "value"))
    eps, scale = torch.finfo(torch.float32).eps, values["scale"] or 5**-0.5
    # lse is saved, not p, and rounded: a relative error of p
    lost = eps * (1 + scale * 5 * q * k + math.log(Tk))
    # dp - delta is 0 for a query with one key: of two equal sums their rounding remains
    terms = eps * 1.5 * v * 3 * scale * max(q, k)
    # sums are multiplied by the exponential of a difference of maxima: two roundings of out
    slack = {"slack": lambda exact: terms + lost * exact.abs().amax(), "sum_slack": 1.0}
    check("attention", **slack, **values)


ADDED = {  # what is added to the rows, the outputs whose gradient is given
    "alone": (False, 0.0, None),
    "residual": (True, 0.0, (1, 1)),
    "residual, y": (True, 0.0, (1, 0)),
    "residual, h": (True, 0.0, (0, 1)),
    "dropout": (True, 0.3, (1, 1)),
    "dropout, y": (True, 0.3, (1, 0)),
    "dropout, h": (True, 0.3, (0, 1)),
}


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(added, weight, bias):
    residual, dropout_p, used = ADDED[added]
    values = CASES["layer_norm"].inputs(
        shape=(1, 3, 37), dtype=torch.float32, weight=weight, bias=bias,
        residual=residual, dropout_p=dropout_p,
    )  # fmt: skip
    check("layer_norm", used, **values)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    check("gelu", **CASES["gelu"].inputs((3, 7), torch.float32, approximate))


ACTIVATIONS = [None, "gelu", "gelu_tanh"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(activation, bias):
    values = CASES["linear"].inputs((67, 5), torch.float32, 19, bias, activation)
    check("linear", **values)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_mlp(activation, biases):
    values = CASES["mlp"].inputs(
        (67, 5), torch.float32, hidden=19, out=7, activation=activation, bias=True
    )
    for name, has in zip(("fc_bias", "proj_bias"), biases, strict=True):
        values[name] = values[name] if has else None
    check("mlp", **values)


NAMES = ("reduction", "label_smoothing", "softcap", "z_loss", "ignore_index")
LOSSES = {  # targets that do not count: -100, by default, or a class id
    ", ".join(map(str, chosen)): dict(zip(NAMES, chosen, strict=True))
    for chosen in itertools.product(
        ["sum", "mean", "none"], [0.0, 0.1], [None, 2.0], [0.0, 0.1], [None, 3]
    )
}


def check_loss(op, shape, options, *more):
    options = dict(LOSSES[options])
    ignore_index = options.pop("ignore_index")
    values = CASES[op].inputs(shape, 33, torch.float32, *more, **options)
    values["target"][:] = torch.tensor([7, 3, 32])
    values["target"][1] = -100 if ignore_index is None else ignore_index
    if ignore_index is not None:
        values["ignore_index"] = ignore_index
    factors = [values[n].abs().amax() for n in ("input", "linear_weight") if n in values]
    size = max(factors) if len(factors) == 2 else 1.0
    # p (1 + 2 z_loss lse) - 1, with lse below 8, times a factor: its terms are rounded
    terms = 1.5 * (1 + 16 * options["z_loss"]) * size * torch.finfo(torch.float32).eps
    # each row's loss is rounded, then their sum
    sum_slack = 0.0 if options["reduction"] == "none" else 1.0
    check(op, slack=lambda exact: terms, sum_slack=sum_slack, **values)


@pytest.mark.parametrize("options", LOSSES)
def test_cross_entropy(options):
    check_loss("cross_entropy", 3, options)


@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy(options, bias):
    check_loss("linear_cross_entropy", (3, 5), options, bias)


KINDS = {  # dtype of the parameters, masters, stochastic rounding
    "float32": (torch.float32, False, False),
    "float64": (torch.float64, False, False),
    "bfloat16": (torch.bfloat16, False, False),
    "float16": (torch.float16, False, False),
    "bfloat16, masters": (torch.bfloat16, True, False),
    "float16, masters": (torch.float16, True, False),
    "bfloat16, stochastic": (torch.bfloat16, False, True),
}
RATES = {  # lr and weight decay
    "numbers": (1e-2, 0.1),
    "tensors": [
        [torch.tensor(x, dtype=torch.float64) for x in each]
        for each in ((1e-2, 3e-3, 0.1), (0.1, 0.0, 0.0))
    ],
}


@pytest.mark.parametrize(
    "kind, rates", [*((kind, "numbers") for kind in KINDS), ("float32", "tensors")]
)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("grad_scale", [None, 4.0])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_adamw(kind, rates, max_grad_norm, grad_scale, found_inf):
    require("triton", "adamw")
    dtype, masters, stochastic = KINDS[kind]
    shapes = ((5, 7), (2051 if stochastic else 9,), (0,))  # that check wants many elements
    values = CASES["adamw"].inputs(shapes, dtype, max_grad_norm, stochastic)
    values["lr"], values["weight_decay"] = RATES[rates]
    if not masters:
        values["masters"] = None
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        values[name] = None if value is None else torch.tensor(value)
    if found_inf:
        changed = [*values["params"], *values["exp_avgs"], *values["exp_avg_sqs"], *values["step"]]
        changed += values["masters"] or []
        before = [t.clone() for t in changed]
        assert adamw_(**values, backend="triton")[1]
        assert all(torch.equal(a, b) for a, b in zip(changed, before, strict=True))
    elif stochastic:
        is_rounded_by_its_random_bits(values, "triton")
    else:
        update_matches_the_reference(values, dtype, "triton")
