"""linear and mlp by Triton."""

import itertools

import pytest
import torch
import torch.nn.functional as F
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

from gptk.ops.linear import triton_impl as linear
from gptk.ops.mlp import triton_impl as mlp

__all__ = ["strict"]

ACTIVATIONS = [None, "gelu", "gelu_tanh"]
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def act(x, activation):
    return x if activation is None else F.gelu(x, approximate=APPROXIMATE[activation])


def torch_linear(x, w, b, activation):
    return act(F.linear(x, w, b), activation)


def torch_mlp(x, w1, b1, w2, b2, activation):
    return F.linear(act(F.linear(x, w1, b1), activation), w2, b2)


def run(function, inputs, dy, activation):
    """(y, gradients) of `function` for the inputs, None where an input is None."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves, activation)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    return y.detach(), [None if t is None else next(grads) for t in leaves]


def run_yardstick(function, inputs, dy, activation):
    return run(function, yardstick(dy.dtype, *inputs), *yardstick(dy.dtype, dy), activation)


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(1, 3, 5), (67, 33, 130)], ids=str)
def test_linear_matches_torch_in_float64(shape, dtype, activation):
    M, K, N = shape
    x, w = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype, scale=K**-0.5)
    b, dy = randn(N, dtype=dtype), randn(M, N, dtype=dtype)
    before = bits(x, w, b, dy)
    y, pre = linear.forward(x, w, b, activation)
    ref, grads = run(torch_linear, double([x, w, b]), dy.double(), activation)
    base, base_grads = run_yardstick(torch_linear, [x, w, b], dy, activation)
    check(y, ref, base, 2)
    assert (pre is None) == (activation is None)
    got = linear.backward(dy, x, w, pre, activation, dtype, dtype, (True, True, True))
    for mine, exact, theirs in zip(got, grads, base_grads, strict=True):
        check(mine, exact, theirs, 3)
    assert unchanged(before, x, w, b, dy)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("has_bias", [True, False])
def test_mlp_matches_torch_in_float64(has_bias, dtype, activation):
    M, C, H, N = 66, 9, 35, 17
    x, w1 = randn(M, C, dtype=dtype), randn(H, C, dtype=dtype, scale=C**-0.5)
    w2, dy = randn(N, H, dtype=dtype, scale=H**-0.5), randn(M, N, dtype=dtype)
    b1, b2 = (randn(H, dtype=dtype), randn(N, dtype=dtype)) if has_bias else (None, None)
    inputs = [x, w1, b1, w2, b2]
    before = bits(*inputs, dy)
    y, pre = mlp.forward(*inputs, activation)
    ref, grads = run(torch_mlp, double(inputs), dy.double(), activation)
    base, base_grads = run_yardstick(torch_mlp, inputs, dy, activation)
    check(y, ref, base, 2)
    needs = tuple(t is not None for t in inputs)
    dtypes = tuple(None if t is None else dtype for t in inputs[1:])
    got = mlp.backward(dy, x, pre, w1, w2, activation, dtypes, needs)
    for mine, exact, theirs in zip(got, grads, base_grads, strict=True):
        assert (mine is None) == (exact is None)
        if mine is not None:
            check(mine, exact, theirs, 3)
    assert unchanged(before, *(t for t in inputs), dy)


def test_only_the_wanted_gradients_are_returned():
    x, w1, w2 = randn(5, 3), randn(4, 3), randn(2, 4)
    b1, b2, dy = randn(4), randn(2), randn(5, 2)
    _, pre = mlp.forward(x, w1, b1, w2, b2, "gelu")
    dtypes = (torch.float32,) * 4
    full = mlp.backward(dy, x, pre, w1, w2, "gelu", dtypes, (True,) * 5)
    for needs in itertools.product([True, False], repeat=5):
        got = mlp.backward(dy, x, pre, w1, w2, "gelu", dtypes, needs)
        for need, mine, all_of_them in zip(needs, got, full, strict=True):
            assert torch.equal(mine, all_of_them) if need else mine is None
    _, pre = linear.forward(x, w1, b1, "gelu")
    dy = randn(5, 4)
    full = linear.backward(dy, x, w1, pre, "gelu", torch.float32, torch.float32, (True,) * 3)
    for needs in itertools.product([True, False], repeat=3):
        got = linear.backward(dy, x, w1, pre, "gelu", torch.float32, torch.float32, needs)
        for need, mine, all_of_them in zip(needs, got, full, strict=True):
            assert torch.equal(mine, all_of_them) if need else mine is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_parameter_gradients_are_not_rounded_to_16_bits(dtype):
    """Parameters in float32 under autocast: 1 + 2^-10 fits neither 16-bit type's 8 bits here."""
    x = guarded(torch.tensor([[1.0], [2.0**-10], [2.0**-12]], dtype=dtype))
    w, dy = guarded(torch.zeros(1, 1, dtype=dtype)), guarded(torch.ones(3, 1, dtype=dtype))
    wide = torch.float32
    _, dweight, _ = linear.backward(dy, x, w, None, None, wide, wide, (True,) * 3)
    assert dweight.dtype == wide
    assert dweight.item() == 1 + 2.0**-10 + 2.0**-12
    _, _, dbias = linear.backward(x, dy, w, None, None, wide, wide, (True,) * 3)
    assert dbias.item() == 1 + 2.0**-10 + 2.0**-12


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 4096])
def test_column_sums_of_many_rows_do_not_stall(rows):
    """A bfloat16 accumulator stops growing at 256 additions; NVIDIA/apex#1652."""
    dy = guarded(torch.full((rows, 3), 2.0**-10, dtype=torch.bfloat16))
    want = torch.full((3,), rows * 2.0**-10, device=DEVICE)
    assert torch.equal(linear.column_sum(dy, torch.float32), want)


def test_bias_is_added_before_rounding():
    """x w = 256.5 and bias -256: a product rounded to bfloat16 first would give 0."""
    x, w = randn(1, 2), randn(1, 2)
    x.copy_(torch.tensor([[256.0, 0.5]]))
    w.fill_(1.0)
    bias = guarded(torch.tensor([-256.0]))
    y, _ = linear.forward(x.bfloat16(), w.bfloat16(), bias.bfloat16(), None)
    assert y.item() == 0.5


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_nan_stays_in_its_row(activation):
    x, w, b = randn(4, 3), randn(5, 3), randn(5)
    x[2, 1] = float("nan")
    y, pre = linear.forward(x, w, b, activation)
    assert y.isnan().any(1).tolist() == [False, False, True, False]
    dx, _, _ = linear.backward(
        torch.ones_like(y), x, w, pre, activation, x.dtype, x.dtype, (True, False, False)
    )
    assert dx.isnan().any(1).tolist() == [False, False, True, False]


def test_same_inputs_give_the_same_bits():
    x, w, b, dy = randn(200, 7), randn(20, 7), randn(20), randn(200, 20)
    _, pre = linear.forward(x, w, b, "gelu_tanh")
    runs = [
        linear.backward(dy, x, w, pre, "gelu_tanh", x.dtype, x.dtype, (True,) * 3) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
