"""What the tests of kernels in Triton's interpreter share: bounds, a mask in numpy, guards."""

import contextlib
import dataclasses
import math
import os
from unittest import mock

import numpy as np
import pytest
import torch

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="checks what Triton's interpreter can see: needs TRITON_INTERPRET=1",
)


@contextlib.contextmanager
def overflow_checks():
    """Make a 32-bit integer that overflows inside an interpreted kernel an error."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    checking = dataclasses.replace(builder.options, debug=True)
    with mock.patch.object(builder, "options", checking):
        yield


@contextlib.contextmanager
def guarded_outputs():
    """Outputs made by torch.empty are full of NaN, between canaries that must not change."""
    canary, pad, made = -77.0, 64, []

    def empty(size, *, dtype=torch.float32, device=None):
        shape = (size,) if isinstance(size, int) else tuple(size)
        n = math.prod(shape)
        buffer = torch.full((n + 2 * pad,), canary, dtype=dtype, device=device)
        buffer[pad : pad + n] = float("nan")
        made.append(buffer)
        return buffer[pad : pad + n].view(shape)

    def empty_like(t):
        return empty(t.shape, dtype=t.dtype, device=t.device)

    with mock.patch.multiple(torch, empty=empty, empty_like=empty_like):
        yield
    assert made, "nothing was guarded"
    for buffer in made:
        assert bool((buffer[:pad] == canary).all()), "a kernel wrote before its output"
        assert bool((buffer[-pad:] == canary).all()), "a kernel wrote past its output"


def guarded(t):
    """A copy of `t` between NaN, so that what a kernel reads past an edge shows in its results."""
    buffer = torch.full((t.numel() + 128,), float("nan"), dtype=t.dtype)
    view = buffer[64 : 64 + t.numel()].view(t.shape)
    return view.copy_(t)


def normal(generator, *shape, dtype=torch.float32):
    return guarded(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))


def keep_rule(seed, rows, cols, p):
    """The keep mask of gptk.random's rule in numpy: one Philox4x32-10 counter for four columns."""
    row, column = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    row, column = row.astype(np.uint64), column.astype(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [column >> np.uint64(2), row & low, row >> shift, np.zeros_like(row)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> shift) ^ c[1] ^ np.uint64(k0),
            b & low,
            (a >> shift) ^ c[3] ^ np.uint64(k1),
            a & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.choose((column & np.uint64(3)).astype(np.int64), c)
    return torch.from_numpy(words.astype(np.int64)) >= round(p * 2**32)


def assert_close(name, got, torch_result, exact, factor, floor=0.0):
    """max |got - exact| <= factor x torch's own error in the same dtype + that dtype's noise.

    The noise is twice what adding and subtracting 0.3 in the dtype of the result does to it. The
    float64 `exact` cannot show torch's error in float64: give torch's float32 result, whose error
    is scaled. `floor` is what the method must lose where torch's does not, by its error analysis.
    Zeros, the negative, the double and a shift of `exact` must be outside the bound.
    """
    assert got.shape == exact.shape, name
    rounded = exact.to(got.dtype)
    noise = 2 * (((rounded + 0.3) - 0.3).double() - exact).abs().max()
    scale = torch.finfo(got.dtype).eps / torch.finfo(torch_result.dtype).eps
    allowed = factor * scale * (torch_result.double() - exact).abs().max() + noise + floor
    error = (got.double() - exact).abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    size = exact.abs().max()
    if size > max(torch.finfo(got.dtype).eps, 2 * floor):
        wrong = [torch.zeros_like(exact), -exact, 2 * exact]
        spread = exact.max() - exact.min()
        if exact.numel() > 1 and spread > 0.1 * size:
            wrong.append(exact.flatten().roll(1).view(exact.shape))
        for candidate in wrong:
            distance = (candidate - exact).abs().max()
            assert distance > allowed, f"{name}: the bound {allowed:.3g} accepts a wrong answer"
