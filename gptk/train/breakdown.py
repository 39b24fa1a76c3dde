"""`gptk train --breakdown`: steps of a training, measured in memory; nothing of it is kept."""

import sys

import torch

from gptk.bench import breakdown
from gptk.train import hardware
from gptk.train.config import ConfigError, TrainConfig
from gptk.train.loop import Done, NonFinite, Training, one_step

STEPS = 10
"""Steps that are measured each way; fewer where --max-steps says so."""


def check_measurable(settings: TrainConfig, device: torch.device) -> None:
    """ConfigError where a kernel cannot be timed at its call."""
    if device.type != "cpu":
        raise ConfigError(
            f"--breakdown times calls on the CPU, and this run is on {device}, where a call "
            "returns before its work is done: add --device cpu, or use the GPU's own profiler"
        )
    if hardware.interpreted(settings.run.backend):
        raise ConfigError(
            f"--backend {settings.run.backend}: its time in Triton's interpreter says nothing of "
            "the kernels, so --breakdown refuses; take --backend auto, cpp or torch"
        )


def measure_and_show(training: Training) -> int:
    """Train a few steps as `loop.train` does, and print where their time goes; the exit code."""
    done: list[Done] = []
    training.model.train()
    steps = min(STEPS, training.config.optim.max_steps)
    try:
        result = breakdown.measure(lambda: done.append(one_step(training)), steps)
    except NonFinite as error:
        print(f"gptk train: {error}", file=sys.stderr)
        return 1
    tokens_per_s = done[-1].n_tokens / result.seconds
    mfu = training.mfu(tokens_per_s)
    print(
        f"measured       {steps} steps of {done[-1].n_tokens:,} tokens, median "
        f"{result.seconds * 1e3:,.2f} ms: {tokens_per_s:,.0f} tokens/s, "
        f"MFU {'n/a' if mfu is None else f'{mfu:.0%}'}\n"
    )
    breakdown.show(result, training.peak)
    return 0
