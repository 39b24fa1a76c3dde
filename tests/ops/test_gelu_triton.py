"""gelu by Triton."""

import math

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

from gptk.ops.gelu import triton_impl as gelu

__all__ = ["strict"]


def formula(x, approximate):
    """(gelu(x), its slope) in float64, from the closed forms."""
    x = x.double().cpu()
    if approximate == "none":
        cdf = 0.5 * torch.erfc(-x / math.sqrt(2))
        return x * cdf, cdf + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    c = 2 * math.sqrt(2 / math.pi)
    s = torch.sigmoid(c * (x + 0.044715 * x**3))
    return x * s, s + x * s * (1 - s) * c * (1 + 3 * 0.044715 * x * x)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("n", [1, 7, 1024, 2061])
def test_matches_formula(n, dtype, approximate):
    x, dy = randn(n, dtype=dtype, scale=2.0), randn(n, dtype=dtype)
    before = bits(x, dy)
    y, slope = formula(x, approximate)
    leaf, upstream = yardstick(dtype, x.clone(), dy)
    base = F.gelu(leaf.requires_grad_(), approximate=approximate)
    check(gelu.forward(x, approximate), y, base, 2)
    base.backward(upstream)
    check(gelu.backward(dy, x, approximate), dy.double().cpu() * slope, leaf.grad, 3)
    assert unchanged(before, x, dy)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_tails_are_exact(dtype, approximate):
    largest = torch.finfo(dtype).max
    x = torch.tensor([15.0, 40.0, 41.0, 100.0, 1e3, 1e10, 1e20, 3e38, math.inf])
    x = x[(x <= largest) | x.isinf()].to(dtype)
    if dtype == torch.float64:  # at 15 both functions still differ from their limits
        x = x[1:]
    x = guarded(torch.cat([x, -x, torch.tensor([largest, -largest], dtype=dtype)]))
    up = x > 0
    y = gelu.forward(x, approximate)
    slope = gelu.backward(torch.ones_like(x), x, approximate)
    assert torch.equal(y, torch.where(up, x, 0.0))
    assert torch.equal(slope, up.to(dtype))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_nan_reaches_its_own_element_only(approximate):
    x = guarded(torch.tensor([1.0, math.nan, -1.0]))
    ones = torch.ones_like(x)
    for out in (gelu.forward(x, approximate), gelu.backward(ones, x, approximate)):
        assert out.isnan().tolist() == [False, True, False]


def test_variants_are_not_swapped():
    x = torch.tensor([-2.699], device=DEVICE)  # the largest gap of the two, 4.73e-4
    assert abs(gelu.forward(x, "tanh").item() + 0.0089123) < 1e-6
    assert abs(gelu.forward(x, "none").item() + 0.0093855) < 1e-6


def test_launch_config_moves_16_bytes_a_thread():
    for dtype in DTYPES:
        config = gelu.launch_config(dtype)
        assert config["BLOCK"] * dtype.itemsize == 32 * config["num_warps"] * 16
