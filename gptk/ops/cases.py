"""What the ops' cases share: seeded tensors that every dtype can hold."""

import torch
from torch import Tensor


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, drawn in float32 and rounded to dtype; the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def classes(shape: tuple[int, ...], V: int, seed: int, ignored: float = 0.0) -> Tensor:
    """Class ids in [0, V), a share of them replaced by -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, shape, generator=generator)
    return ids.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)
