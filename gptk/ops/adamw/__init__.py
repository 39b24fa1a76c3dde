"""adamw_: the contract and its checks. In place: params, moments, masters and steps change."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gptk.ops.contract import check_addresses, is_reference, resolve


def grad_norm(grads: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The L2 norm of all gradients together: 0-dim float64, no overflow for 100 x 1e20."""
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    impl = resolve("adamw", backend, grads[0])
    if not is_reference(impl):
        check_addresses("grad_norm", grads)
    return impl.norm([g.contiguous() for g in grads])


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
        params, grads, exp_avgs, exp_avg_sqs: equal shapes, any layout, one device.
        step: 0-dim float32 tensors there, updates done so far; each advances by one.
        lr, weight_decay: one value, or one per parameter.
        max_grad_norm: clip all gradients together to this L2 norm.
        grad_scale: divide gradients by it. found_inf: non-zero skips the update.
        masters: float32 copies of 16-bit parameters, updated first and rounded into them. Where
            a parameter is not its master's rounding, it was changed since, and its value wins.
        norm: the unscaled gradients' norm where known (several calls clipped together).
        backend: auto, torch, triton or cpp.

    Returns: (norm, skipped): the gradients' norm before clipping (None without max_grad_norm), and
        whether nothing was changed because a gradient was not finite (None if never asked).

    Raises:
        ValueError: lists, shapes, dtypes or devices that do not fit together.
    """
    if not params:
        return norm, found_inf
    count, device = len(params), params[0].device
    impl = resolve("adamw", backend, params[0])
    rates, decays = (_scalars(x, count, device) for x in (lr, weight_decay))
    kept = [None] * count if masters is None else list(masters)
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check({**lists, "step": step, "masters": kept, "lr": rates, "weight_decay": decays})
    if not is_reference(impl):
        check_addresses("adamw_", params, grads, exp_avgs, exp_avg_sqs, step)
    # a kernel follows their addresses too
    wait = device.type == "cpu"  # a copy to it that does not is read too early
    norm, grad_scale, found_inf = (
        None if x is None else x.to(device, non_blocking=not wait)
        for x in (norm, grad_scale, found_inf)
    )
    dense = [g.contiguous() for g in grads]
    multiplier: float | Tensor = 1.0 if grad_scale is None else 1.0 / grad_scale
    skip = None if found_inf is None else found_inf.reshape(()) != 0
    if max_grad_norm is not None:
        if norm is None:
            norm = impl.norm(dense) * multiplier
        bad = ~norm.isfinite()
        skip = bad if skip is None else skip | bad
        multiplier = multiplier * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    changed = (params, exp_avgs, exp_avg_sqs, kept)
    work = [[None if t is None else t.contiguous() for t in ts] for ts in changed]
    impl.update(
        work[0],
        dense,
        *work[1:],
        list(step),
        rates,
        decays,
        *betas,
        eps,
        multiplier,
        skip,
    )
    if not is_reference(impl):  # kernels write behind autograd's back
        increment_version([t for ts in (*work, step) for t in ts if t is not None])
    for originals, copies in zip(changed, work, strict=True):
        for original, copy in zip(originals, copies, strict=True):
            if original is not None and copy is not None and original is not copy:
                original.copy_(copy)
    return norm, skip


def _scalars(values: Any, count: int, device: torch.device) -> list[float | Tensor]:
    """One for each parameter; a tensor stays on the host, where it is read, or comes to them."""
    each = list(values) if isinstance(values, Sequence) else [values] * count
    return [x.to(device) if isinstance(x, Tensor) and x.device.type != "cpu" else x for x in each]


def _check(lists: dict[str, Sequence[Any]]) -> None:
    """The kernels follow addresses: from a wrong size or dtype they would write to other memory."""
    params = lists["params"]
    count, device, shapes = len(params), params[0].device, [p.shape for p in params]
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(f"adamw_: {len(values)} {name} for {count} params")
    for name in ("grads", "exp_avgs", "exp_avg_sqs"):
        _same(name, "shape", [t.shape for t in lists[name]], shapes)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "step"):
        _same(name, "device", [t.device for t in lists[name]], [device] * count)
    moments = [m.dtype for m in lists["exp_avgs"]]
    _same("exp_avg_sqs", "dtype", [v.dtype for v in lists["exp_avg_sqs"]], moments)
    _same("step", "shape", [t.shape for t in lists["step"]], [torch.Size()] * count)
    _same("step", "dtype", [t.dtype for t in lists["step"]], [torch.float32] * count)
    if all(m is None for m in lists["masters"]):
        return
    held = [p if m is None else m for p, m in zip(params, lists["masters"], strict=True)]
    _same("masters", "shape", [m.shape for m in held], shapes)
    _same("masters", "device", [m.device for m in held], [device] * count)
    for i, (p, m) in enumerate(zip(params, lists["masters"], strict=True)):
        if m is not None and (m.dtype != torch.float32 or p.dtype.itemsize != 2):
            raise ValueError(
                f"adamw_: masters[{i}] is {m.dtype} for a {p.dtype} parameter, "
                "not torch.float32 for one of 16 bits"
            )


def _same(name: str, trait: str, got: list[Any], right: list[Any]) -> None:
    if got != right:
        i = next(i for i, pair in enumerate(zip(got, right, strict=True)) if pair[0] != pair[1])
        has, wants = (tuple(x) if isinstance(x, torch.Size) else x for x in (got[i], right[i]))
        raise ValueError(f"adamw_: {name}[{i}] has {trait} {has}, not {wants}")
