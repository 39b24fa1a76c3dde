"""What every Triton kernel of gptk shares: can it run here, how it starts, how it reads and rounds.

Importing this module imports triton, so `gptk.ops.contract` loads it only once triton is wanted.

Triton's CPU interpreter keeps bfloat16 as raw 16-bit integers: arithmetic on it is wrong, a store
from float32 truncates, and subnormals are converted wrongly. Kernels therefore read with `widen`
and write with `narrow`, which are a plain conversion (cvt.rn on a GPU) when compiled and integer
arithmetic with the same result when interpreted.
"""

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.tuning_file import NO_LIMIT

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether the kernels of this process are interpreted: fixed when triton decorates them."""

ACC = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""Input dtype -> dtype of sums, statistics and softmax."""


def why_not(device_type: str) -> str | None:
    """None if a Triton kernel can run on tensors of this device type, else why and the remedy."""
    if INTERPRETED.value:
        return None
    remedy = (
        "set TRITON_INTERPRET=1 before the program starts to run the kernels in Triton's (slow) "
        "interpreter on the CPU"
    )
    if not torch.cuda.is_available():
        return f"no GPU that torch can use; {remedy}"
    if device_type != "cuda":
        return f"device {device_type}: compiled kernels take cuda tensors; {remedy}"
    return None


def architecture(device: torch.device) -> int:
    """The compute capability that kernels are compiled for, 80 for 8.0; 0 in the interpreter."""
    if INTERPRETED.value:
        return 0
    if device.type == "cuda":
        return _capability(device)
    return triton.runtime.driver.active.get_current_target().arch


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any
) -> None:
    """Run `kernel` on `device`, which need not be torch's current one.

    Multiply-adds are fused, which Triton 3.9 warns will have to be asked for.
    """
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, enable_fp_fusion=True, **meta)


def options(num_warps: int, num_stages: int, maxnreg: int = NO_LIMIT) -> dict[str, int]:
    """How a kernel is compiled; maxnreg, the most registers of a thread, only where it is less than
    NO_LIMIT: a limit is for a kernel that needs a few more than would let two run on a processor.
    """
    chosen = {"num_warps": num_warps, "num_stages": num_stages}
    return chosen if maxnreg >= NO_LIMIT else {**chosen, "maxnreg": maxnreg}


def split_seed(seed: int | Tensor, device: torch.device) -> tuple[Tensor | int, int]:
    """The kernel arguments (seed_low, seed_high) of a 64-bit seed: see philox_triton.philox_key.

    An int becomes two signed 32-bit halves, so every seed has the same argument types; a 0-dim
    int64 tensor is passed as its address and read by the kernel, so the host need not wait for it.
    """
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64, non_blocking=True), 0
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """(threshold, keep_scale): a Philox word >= threshold is kept and multiplied by keep_scale."""
    return round(dropout_p * 2**32), 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


@triton.jit
def widen(x, dtype: tl.constexpr):
    """x in `dtype` (float32 or float64), exactly; call it on every loaded value at once."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = x
    return wide.to(dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x (float32 or float64) in `dtype`, rounded to nearest even; NaN stays NaN."""
    if dtype == tl.bfloat16:
        single = x.to(tl.float32)
        if INTERPRETED:
            bits = single.to(tl.uint32, bitcast=True)
            bits = tl.where(single != single, 0x7FC00000, bits)  # the carry must not reach NaN
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            small = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            small = single.to(tl.bfloat16)
    else:
        small = x.to(dtype)
    return small


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """exp(x): in float32 by the hardware's exp2, whose results below 2^-126 are 0.

    tl.exp spends three instructions more on keeping these.
    """
    if x.dtype == tl.float32:
        y = tl.exp2(x * LOG2E)
    else:
        y = tl.exp(x)
    return y


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in acc's dtype; float32 operands are not cut to TF32."""
    if INTERPRETED:
        a, b = widen(a, acc.dtype), widen(b, acc.dtype)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
