"""adamw_: the contract and its checks. In place: params, moments, masters and steps change."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gptk.ops.contract import is_reference, resolve


def grad_norm(grads: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The L2 norm of all gradients together: 0-dim float64, no overflow for 100 x 1e20."""
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    return resolve("adamw", backend, grads[0]).norm([g.contiguous() for g in grads])


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Sequence[Tensor],
    *,
    lr: float | Tensor | Sequence[float | Tensor],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 1e-2,
    max_grad_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor | None] | None = None,
    norm: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """p = (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps), for all parameters in one call.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: equal shapes, one device.
        step: 0-dim float32 tensors, updates done so far; each advances by one.
        lr, weight_decay: one value, or one per parameter.
        max_grad_norm: clip all gradients together to this L2 norm.
        grad_scale: divide gradients by it. found_inf: non-zero skips the update.
        masters: float32 copies of 16-bit parameters, updated first and rounded into them.
        norm: the unscaled gradients' norm where known (several calls clipped together).
        backend: auto, torch, triton or cpp.

    Returns: (norm, skipped): the gradients' norm before clipping (None without max_grad_norm), and
        whether nothing was changed because a gradient was not finite (None if never asked).
    """
    if not params:
        return norm, found_inf
    count = len(params)
    impl = resolve("adamw", backend, params[0])
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * count
    decays = list(weight_decay) if isinstance(weight_decay, Sequence) else [weight_decay] * count
    dense = [g.contiguous() for g in grads]
    multiplier: float | Tensor = 1.0 if grad_scale is None else 1.0 / grad_scale
    skip = None if found_inf is None else found_inf.reshape(()) != 0
    if max_grad_norm is not None:
        if norm is None:
            norm = impl.norm(dense) * multiplier
        bad = ~norm.isfinite()
        skip = bad if skip is None else skip | bad
        multiplier = multiplier * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    work = [[t.contiguous() for t in ts] for ts in (params, exp_avgs, exp_avg_sqs)]
    impl.update(
        work[0],
        dense,
        work[1],
        work[2],
        list(masters) if masters is not None else [None] * count,
        list(step),
        rates,
        decays,
        *betas,
        eps,
        multiplier,
        skip,
    )
    if not is_reference(impl):  # kernels write behind autograd's back
        increment_version([t for ts in (*work, step) for t in ts])
        increment_version([m for m in masters or () if m is not None])
    for originals, copies in zip((params, exp_avgs, exp_avg_sqs), work, strict=True):
        for original, copy in zip(originals, copies, strict=True):
            if original is not copy:
                original.copy_(copy)
    return norm, skip
