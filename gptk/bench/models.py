"""Whole training steps (forward, backward, clipping, AdamW) and generation, by provider."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import gptk
from gptk.bench import baseline
from gptk.bench.gate import FORWARD, Verdict, accepted, error
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
TRUTH = "float64"
"""The provider that the others are judged by; it is never timed."""


class Provider(NamedTuple):
    """step: one training step; losses: every token's, without dropout, nothing changes; forget:
    the gradients."""

    step: Callable[[], None]
    losses: Callable[[], torch.Tensor]
    forget: Callable[[], None]


def providers(
    size: str, dtypes: list[torch.dtype], backends: list[str], device: str = "cpu"
) -> dict[str, Provider]:
    """Provider and dtype -> its step, and TRUTH. All start from the same weights.

    bf16 is autocast over float32 parameters, for everyone.
    """
    config, batch_size = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(
        config.vocab_size, (batch_size, config.block_size + 1), generator=generator
    ).to(device)
    torch.manual_seed(0)
    weights = gptk.GPT(config)
    exact = baseline.GPT(config)
    baseline.load(exact, weights)
    exact = exact.double().to(device)
    made = {TRUTH: _provider(exact, exact, baseline.Clipped(exact), idx, torch.float64)}
    for dtype in dtypes:
        for name in ("PyTorch", *backends):
            if name in ("PyTorch", COMPILED):
                module = baseline.GPT(config)
                baseline.load(module, weights)
                module = module.to(device)
                model = torch.compile(module) if name == COMPILED else module
                provider = _provider(model, module, baseline.Clipped(module), idx, dtype)
            else:
                name = f"gptk {name}"
                model = gptk.GPT(config, backend=name[5:])
                model.load_state_dict(weights.state_dict())
                model = model.to(device)
                optimizer = AdamW(
                    model.param_groups(0.1),
                    lr=1e-3,
                    betas=(0.9, 0.95),
                    max_grad_norm=1.0,
                    backend=name[5:],
                )
                provider = _provider(model, model, optimizer, idx, dtype)
            made[f"{name} {NAMES[dtype]}"] = provider
    return made


def _provider(
    model: Callable[..., torch.Tensor],
    module: nn.Module,
    optimizer: Any,
    idx: torch.Tensor,
    dtype: torch.dtype,
) -> Provider:
    def loss(reduction: str = "mean") -> torch.Tensor:
        with torch.autocast(idx.device.type, dtype, enabled=dtype.itemsize == 2):
            return model(idx[:, :-1], idx[:, 1:], reduction=reduction)

    def forget() -> None:
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        forget()
        loss().backward()
        optimizer.step()

    def losses() -> torch.Tensor:
        module.eval()
        with torch.no_grad():
            rows = loss("none").flatten()
        module.train()
        return rows

    return Provider(step, losses, forget)


def verdicts(found: dict[str, Provider]) -> dict[str, Verdict]:
    """Are each provider's losses, token by token and before any step, near enough to float64's?

    As near as the gate of an op's outputs asks: within twice the error of PyTorch in that dtype.
    """
    losses = {name: provider.losses() for name, provider in found.items()}
    truth = losses.pop(TRUTH)
    made = {}
    for name, rows in losses.items():
        own = losses[f"PyTorch {name.split()[-1]}"]
        ratio = error(rows, truth) / error(own, truth) if error(own, truth) else math.nan
        made[name] = Verdict(accepted(rows, truth, own, FORWARD), ratio)
    return made


def flops(size: str) -> int:
    """Of one step: 6 N + 12 L C T per token, as in training's MFU."""
    config, batch_size = SIZES[size]
    with torch.device("meta"):
        model = gptk.GPT(config)
    return model.flops_per_token(config.block_size) * batch_size * config.block_size
