"""The C++ matrix product: every layout, dtype, epilogue and instruction set, against float64."""

import itertools
import json
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gptk import native

if native.available() is not None:
    pytest.skip(native.available(), allow_module_level=True)

from gptk.ops.cpp_product import OWN, product

MEASURED = Path(__file__).parents[2] / "benchmarks" / "products.json"

SHAPES = [(1, 7, 64), (2, 33, 385), (4, 5, 1), (5, 16, 3), (17, 70, 100), (131, 2050, 9)]
SHAPES += [(8, 32, 800), (0, 3, 2)]
GELU = {None: lambda z: z, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}


@pytest.fixture(params=native.isa_levels())
def isa(request):
    before = native.isa()
    native.load().select_isa(request.param)
    yield request.param
    native.load().select_isa(before)


def operands(M, N, K, dtype, transpose_a=False, transpose_b=False):
    torch.manual_seed(M + N + K)
    a = torch.randn(K, M).to(dtype).t() if transpose_a else torch.randn(M, K).to(dtype)
    b = torch.randn(N, K).to(dtype).t() if transpose_b else torch.randn(K, N).to(dtype)
    return a, b


def bound(a, b, acc):
    """A sum of K products, in any order: K eps / 2 times the sum of their absolute values."""
    eps = torch.finfo(acc).eps
    return (a.shape[1] + 2) * eps * (a.double().abs() @ b.double().abs()) + 1e-300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_every_layout(shape, dtype, isa):
    acc = native.ACC[dtype]
    for layout in itertools.product([False, True], repeat=2):
        a, b = operands(*shape, dtype, *layout)
        c, _ = product(a, b, out=acc)
        assert ((c.double() - a.double() @ b.double()).abs() <= bound(a, b, acc)).all()


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_float32_operands_are_rounded_to_the_compute_dtype(compute, isa):
    for M in (3, 24):
        a, b = operands(M, 37, 130, torch.float32, transpose_b=True)
        low_a, low_b = a.to(compute), b.to(compute)
        for one, other in ((a, b), (low_a, b), (a, low_b)):
            c, _ = product(one, other, compute=compute, out=torch.float32)
            exact = low_a.double() @ low_b.double()
            assert ((c.double() - exact).abs() <= bound(low_a, low_b, torch.float32)).all()


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 37, 64), (13, 65, 100), (12, 32, 900)])
def test_epilogues(shape, activation, isa):
    a, b = operands(*shape, torch.float32, transpose_b=True)
    a = a / shape[2] ** 0.5
    bias, slope_of = torch.randn(shape[1]), torch.randn(shape[:2])
    z = a.double() @ b.double() + bias.double()
    y, pre = product(a, b, bias, activation, keep_pre=True)
    torch.testing.assert_close(pre, z.float())
    torch.testing.assert_close(y, GELU[activation](z).float())
    x = slope_of.double().requires_grad_()
    (slope,) = torch.autograd.grad(GELU[activation](x).sum(), x)
    c, value = product(a, b, activation=activation, slope_of=slope_of, keep_value=True)
    torch.testing.assert_close(c, ((z - bias) * slope).float())
    torch.testing.assert_close(value, GELU[activation](slope_of))


def test_the_number_of_threads_changes_no_bit(isa):
    before = torch.get_num_threads()
    try:
        for shape in ((3, 500, 700), (131, 300, 900)):
            a, b = operands(*shape, torch.float32, transpose_b=True)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(product(a, b)[0])
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


def test_whose_products_are_taken_is_what_was_measured():
    found = {}
    for row in json.loads(MEASURED.read_text("utf-8"))["rows"]:
        found.setdefault((row["isa"], row["dtype"]), []).append(row["ratio"])
    for level, kinds in OWN.items():
        for dtype, ratio in kinds.items():
            ratios = found[level, str(dtype).removeprefix("torch.")]
            assert ratio == round(statistics.median(ratios), 2), (level, dtype)
            assert ratio < 1.1
