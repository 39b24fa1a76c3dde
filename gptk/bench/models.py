"""Whole training steps (forward, backward, clipping, AdamW) and generation, by provider."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

import gptk
from gptk.bench import baseline
from gptk.bench.providers import COMPILED
from gptk.model import GPTConfig
from gptk.optim import AdamW


class Size(NamedTuple):
    """A configuration and its batch size."""

    config: GPTConfig
    batch_size: int


SIZES = {
    "nano": Size(GPTConfig(64, 65, 4, 4, 128), 12),
    "shakespeare": Size(GPTConfig(256, 65, 6, 6, 384, 0.2), 16),
    "gpt2": Size(GPTConfig(256, 50304, 12, 12, 768), 4),
}
"""nanoGPT's CPU example, its character-level example, GPT-2 124M at a context of 256."""
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
Step = Callable[[], float]


def steps(
    size: str, dtypes: list[torch.dtype], backends: list[str], device: str = "cpu"
) -> dict[str, Step]:
    """Provider and dtype -> one training step that returns its loss.

    bf16 is autocast over float32 parameters, for everyone.
    """
    config, batch_size = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(
        config.vocab_size, (batch_size, config.block_size + 1), generator=generator
    ).to(device)
    made: dict[str, Step] = {}
    for dtype in dtypes:
        torch.manual_seed(0)
        plain = baseline.GPT(config).to(device)
        made[f"PyTorch {NAMES[dtype]}"] = _theirs(plain, plain, idx, dtype, device)
        if COMPILED in backends:
            other = baseline.GPT(config).to(device)
            compiled = torch.compile(other)
            made[f"compile {NAMES[dtype]}"] = _theirs(compiled, other, idx, dtype, device)
        for backend in backends:
            if backend != COMPILED:
                torch.manual_seed(0)
                model = gptk.GPT(replace(config), backend=backend).to(device)
                made[f"gptk {backend} {NAMES[dtype]}"] = _ours(model, idx, dtype, backend, device)
    return made


def _theirs(
    model: Callable[..., torch.Tensor],
    module: nn.Module,
    idx: torch.Tensor,
    dtype: torch.dtype,
    device: str,
) -> Step:
    optimizer = baseline.optimizer(module, 1e-3)
    params = list(module.parameters())

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def _ours(
    model: gptk.GPT, idx: torch.Tensor, dtype: torch.dtype, backend: str, device: str
) -> Step:
    groups = model.param_groups(0.1)
    optimizer = AdamW(groups, lr=1e-3, betas=(0.9, 0.95), max_grad_norm=1.0, backend=backend)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def flops(size: str) -> int:
    """Of one step: 6 N + 12 L C T per token, as in training's MFU."""
    config, batch_size = SIZES[size]
    with torch.device("meta"):
        model = gptk.GPT(config)
    return model.flops_per_token(config.block_size) * batch_size * config.block_size
