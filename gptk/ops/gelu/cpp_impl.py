"""gelu by the C++ extension (csrc/cpu/gelu.cpp): its activation kernels without a bias."""

import torch
from torch import Tensor

from gptk.native import DTYPE, alive, load, threads

CODE = {"none": 1, "tanh": 2}  # approximate -> GPTK_GELU, GPTK_GELU_TANH


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """Every shape and every dtype of the catalog runs."""
    return None


def forward(x: Tensor, approximate: str) -> Tensor:
    y = torch.empty_like(x)
    dtype = DTYPE[x.dtype]
    load().activation_forward(
        y.data_ptr(),
        0,  # pre
        x.data_ptr(),
        0,  # bias
        1,
        x.numel(),
        CODE[approximate],
        dtype,
        dtype,
        0,
        threads(),
    )
    alive(x)
    return y


def backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    dx = torch.empty_like(x)
    dtype = DTYPE[x.dtype]
    load().activation_backward(
        dx.data_ptr(),
        0,  # y
        0,  # dbias
        0,
        dy.data_ptr(),
        x.data_ptr(),
        1,
        x.numel(),
        0,
        CODE[approximate],
        dtype,
        0,
        DTYPE[dy.dtype],
        dtype,
        threads(),
    )
    alive(dy, x)
    return dx
