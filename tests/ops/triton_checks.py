"""What the tests of the Triton kernels share: where they run, safe buffers, derived tolerances."""

import dataclasses
import math

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from gptk.ops.triton_launch import INTERPRETED  # noqa: E402

if not INTERPRETED.value and not torch.cuda.is_available():
    pytest.skip("no GPU and TRITON_INTERPRET is not 1", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED.value else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def short(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """32-bit overflow is an error in the interpreter; torch.empty gives NaN, so that an element
    that no kernel writes shows; numpy's warnings are errors by pytest's configuration."""
    if INTERPRETED.value:
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    with np.errstate(all="warn", under="ignore"):
        yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=torch.float32, scale=1.0):
    """Normal values between NaN canaries: a read outside shows up in the result."""
    return guarded((torch.randn(*shape) * scale).to(dtype))


def guarded(t, pad=64):
    """A copy of t on DEVICE in the middle of a buffer of NaN."""
    buffer = torch.full((t.numel() + 2 * pad,), math.nan, dtype=t.dtype, device=DEVICE)
    return buffer[pad : pad + t.numel()].view(t.shape).copy_(t)


def yardstick(dtype, *tensors):
    """The tensors in which to run torch's own op: float64 results are judged by float32's error."""
    return [t.float() if dtype == torch.float64 and t is not None else t for t in tensors]


def tolerance(ref, base, factor):
    """factor x torch's own error in base's dtype + that dtype's own rounding noise around ref."""
    ref = ref.detach().double().cpu()
    r = ref.to(base.dtype)
    noise = 2 * ((r + 0.3) - 0.3 - r).double().abs().max()
    return float(factor * (base.detach().double().cpu() - ref).abs().max() + noise)


def check(got, ref, base, factor, rejects=True):
    """got agrees with ref (float64) to within the tolerance; wrong answers do not."""
    wide = got.dtype == torch.float64
    assert base.dtype == (torch.float32 if wide else got.dtype)
    assert got.shape == ref.shape
    assert got.is_contiguous()
    # float64: 2^-53 against 2^-24, twice, because the reference has the same precision
    limit = tolerance(ref, base, factor) * (2.0**-28 if wide else 1.0)
    ref = ref.detach().double().cpu()

    def error(x):
        return float((x.detach().double().cpu() - ref).abs().max())

    assert error(got) <= limit, (error(got), limit)
    if rejects:
        wrong = [torch.zeros_like(got), -got, 2 * got]
        if got.numel() > 1:
            wrong.append(got.flatten().roll(1).view(got.shape))
        for x in wrong:
            assert not error(x) <= limit


def bits(*tensors):
    """A copy of the tensors' bytes, to see that nothing was written."""
    return [
        None
        if t is None
        else t.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        for t in tensors
    ]


def unchanged(before, *tensors):
    pairs = zip(before, bits(*tensors), strict=True)
    return all(a is None or torch.equal(a, b) for a, b in pairs)
