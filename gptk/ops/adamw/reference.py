"""AdamW: the definition, and the torch backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptk.random import round_stochastically


def norm(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, summed in float64."""
    device = grads[0].device if grads else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for g in grads:
        total = total + g.double().square().sum()
    return total.sqrt()


def factors(
    norm: Tensor | None,
    scaled: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float | None,
) -> tuple[Tensor | None, Tensor | None, float | Tensor]:
    """(norm, skip, multiplier): the norm of the gradients over grad_scale (`scaled`: the one given
    is not over it yet), whether to skip the update, and what to multiply each gradient by."""
    skip = None if found_inf is None else found_inf.reshape(()) != 0
    multiplier = 1.0 if grad_scale is None else 1.0 / grad_scale.reshape(())
    if norm is None or max_grad_norm is None:
        return norm, skip, multiplier
    if scaled and grad_scale is not None:
        norm = norm * multiplier
    bad = norm * 0.0 != 0.0  # of infinity and NaN it is NaN
    clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm, bad if skip is None else skip | bad, clip * multiplier


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    grad_multiplier: float | Tensor,
    skip: Tensor | None,
    rounding: tuple[int, Sequence[int]] | None = None,
) -> None:
    """Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101, in place; skip: no change.

    rounding: (seed, row of each parameter) where bfloat16 without master is rounded stochastically.
    """
    if skip is not None and bool(skip):
        return
    lists = (params, grads, exp_avgs, exp_avg_sqs, masters, steps, lr, weight_decay)
    for i, (p, g, m, v, master, step, rate, decay) in enumerate(zip(*lists, strict=True)):
        step += 1
        t = float(step)
        w = p
        stochastic = rounding if p.dtype == torch.bfloat16 and master is None else None
        if stochastic is not None:
            w = p.float()
        if master is not None:  # where p is not its rounding, p was changed since the last update
            w = master.copy_(torch.where(master.to(p.dtype) == p, master, p))
        g = g.to(m.dtype) * grad_multiplier
        w.mul_(1 - rate * decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (v / (1 - beta2**t)).sqrt_().add_(eps)
        w.sub_(rate / (1 - beta1**t) * m / denominator)
        if stochastic is not None:
            p.copy_(round_stochastically(w, stochastic[0], stochastic[1][i], int(t)))
        if master is not None:
            p.copy_(master)
