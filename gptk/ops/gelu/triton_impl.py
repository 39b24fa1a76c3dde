"""gelu by Triton: one pass over flat memory; also the activation that `linear` and `mlp` fuse.

    erf    y = x (1 + erf(x / sqrt 2)) / 2          y' = cdf + x pdf
    tanh   y = x s,  s = sigmoid(2u)                 y' = s + x s (1 - s) 2u'
           u = sqrt(2 / pi) (x + 0.044715 x^3), so that (1 + tanh u) / 2 = sigmoid(2u)

x is first clamped to [-40, 40], where both slopes are 0 and 1 to every digit of float64: no power
of x overflows, inf - inf and inf * 0 cannot arise, and the tails are exactly 0 and x. sigmoid and
1 - sigmoid come from one exp(-|2u|), which cannot overflow, and neither is formed by cancellation.
A comparison with NaN is false, so NaN passes the clamp and reaches the result.

Traffic: forward reads x and writes y; backward reads dy and x and writes dx; nothing else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptk.ops.triton_launch import ACC, architecture, launch, narrow, why_not, widen
from gptk.ops.tuning import user_row

TL = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
"""torch dtype -> Triton dtype."""

ACTIVATION = {"none": "gelu", "tanh": "gelu_tanh"}
"""`approximate` of gelu -> `activation` of linear and mlp, which is what the kernels know."""


def launch_config(dtype: torch.dtype) -> dict[str, int]:
    """Block and warps for elementwise work: 16 bytes per thread and access in every dtype."""
    return {"BLOCK": 128 * (16 // dtype.itemsize), "num_warps": 4}


def _config(kernel: str, x: Tensor, activation: str) -> dict[str, int]:
    """The user's configuration, or the one that ships."""
    own = user_row(kernel, architecture(x.device), 8 * x.element_size(), 0, activation)
    return launch_config(x.dtype) if own is None else {"BLOCK": own[0], "num_warps": own[1]}


@triton.jit
def _clamp(x):
    return tl.where(x > 40.0, 40.0, tl.where(x < -40.0, -40.0, x))


@triton.jit
def _sigmoid_2u(x):
    """(sigmoid(2u), 1 - sigmoid(2u)) for x in [-40, 40]."""
    a = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi)
    e = tl.exp(-tl.abs(a))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(a >= 0.0, large, small), tl.where(a >= 0.0, small, large)


@triton.jit
def gelu(x, ACTIVATION: tl.constexpr):
    """gelu(x), x float32 or float64; ACTIVATION is "gelu" (erf) or "gelu_tanh"."""
    near = _clamp(x)
    if ACTIVATION == "gelu_tanh":
        s, _ = _sigmoid_2u(near)
        y = near * s
    else:
        y = near * (0.5 * (1.0 + tl.erf(near * 0.7071067811865476)))
    return tl.where(x > 40.0, x, y)


@triton.jit
def gelu_slope(x, ACTIVATION: tl.constexpr):
    """d gelu(x) / dx, x float32 or float64."""
    near = _clamp(x)
    if ACTIVATION == "gelu_tanh":
        s, rest = _sigmoid_2u(near)
        slope = s + near * (s * rest) * (1.5957691216057308 * (1.0 + 0.134145 * near * near))
    else:
        cdf = 0.5 * (1.0 + tl.erf(near * 0.7071067811865476))
        pdf = 0.3989422804014327 * tl.exp(-0.5 * near * near)  # 1 / sqrt(2 pi)
        slope = cdf + near * pdf
    return slope


@triton.jit
def _forward_block(y_ptr, x_ptr, at, inside, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    x = widen(tl.load(x_ptr + at, mask=inside), ACC)
    y = gelu(x, ACTIVATION)
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_block(dx_ptr, dy_ptr, x_ptr, at, inside, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    x = widen(tl.load(x_ptr + at, mask=inside), ACC)
    dy = widen(tl.load(dy_ptr + at, mask=inside), ACC)
    dx = dy * gelu_slope(x, ACTIVATION)
    tl.store(dx_ptr + at, narrow(dx, dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _gelu_forward_kernel(
    y_ptr,  # (n,)
    x_ptr,  # (n,)
    n,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    # A mask of unknown alignment forbids wide accesses, and n depends on the batch, so it must not
    # be specialised: whole blocks take the path without a mask.
    if start + BLOCK <= n:
        _forward_block(y_ptr, x_ptr, at, None, ACTIVATION, ACC)
    else:
        _forward_block(y_ptr, x_ptr, at, at < n, ACTIVATION, ACC)


@triton.jit(do_not_specialize=["n"])
def _gelu_backward_kernel(
    dx_ptr,  # (n,)
    dy_ptr,  # (n,)
    x_ptr,  # (n,)
    n,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _backward_block(dx_ptr, dy_ptr, x_ptr, at, None, ACTIVATION, ACC)
    else:
        _backward_block(dx_ptr, dy_ptr, x_ptr, at, at < n, ACTIVATION, ACC)


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """None, or why this call cannot run; every shape of the four dtypes can."""
    if dtype not in TL:
        return f"dtype {dtype} (supported: {', '.join(map(str, TL))})"
    return why_not(device_type)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """act(x) in x's dtype, x contiguous; activation as `linear` names it, None gives x itself."""
    if activation is None:
        return x
    y = torch.empty_like(x)
    config = _config("gelu.forward", x, activation)
    grid = (triton.cdiv(x.numel(), config["BLOCK"]),)
    acc = TL[ACC[x.dtype]]
    launch(_gelu_forward_kernel, grid, x.device, y, x, x.numel(), activation, acc, **config)
    return y


def forward(x: Tensor, approximate: str) -> Tensor:
    """y = gelu(x); approximate "none" or "tanh"."""
    return activate(x, ACTIVATION[approximate])


def backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dx = dy gelu'(x), in x's dtype."""
    dx = torch.empty_like(x)
    config = _config("gelu.backward", x, ACTIVATION[approximate])
    grid = (triton.cdiv(x.numel(), config["BLOCK"]),)
    launch(
        _gelu_backward_kernel,
        grid,
        x.device,
        dx,
        dy,
        x,
        x.numel(),
        ACTIVATION[approximate],
        TL[ACC[x.dtype]],
        **config,
    )
    return dx
