"""The learning rate as a pure function of the optimizer step.

Linear warm-up whose first step is not zero, then a cosine to min_lr (Loshchilov & Hutter 2017,
https://arxiv.org/abs/1608.03983), then min_lr for ever. A step is one optimizer update, however
many micro-batches it accumulates.
"""

import math


def learning_rate(
    step: int, *, max_lr: float, min_lr: float, warmup_steps: int, max_steps: int
) -> float:
    """The learning rate of update `step` (0 is the first one).

    step < warmup:  max_lr * (step + 1) / warmup, but at least min_lr
    then            min_lr + (max_lr - min_lr) * (1 + cos(pi * t)) / 2,  t from 0 to 1
    step >= max_steps:  min_lr

    max_lr is reached once, by the last warm-up step (by step 0 without warm-up). The warm-up is
    cut to max_steps where it is longer, so that the maximum is reached then, too.

    Raises:
        ValueError: not 0 <= min_lr <= max_lr, or a negative step count.
    """
    if not (0.0 <= min_lr <= max_lr < math.inf):
        raise ValueError(f"min_lr={min_lr} and max_lr={max_lr} must satisfy 0 <= min_lr <= max_lr")
    if step < 0 or warmup_steps < 0 or max_steps < 0:
        raise ValueError(
            f"step={step}, warmup_steps={warmup_steps}, max_steps={max_steps}: none may be negative"
        )
    if step >= max_steps:
        return min_lr
    peak = max(0, min(warmup_steps, max_steps) - 1)  # the step that has max_lr
    if step <= peak:
        return max(min_lr, max_lr * ((step + 1) / (peak + 1)))
    t = (step - peak) / (max_steps - peak)
    return min_lr + (max_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * t))
