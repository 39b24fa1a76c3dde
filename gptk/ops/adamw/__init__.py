"""adamw_: the contract and its checks. In place: params, moments, masters and steps change."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gptk.ops.contract import is_reference, resolve
from gptk.ops.tensors import check_addresses, readable
from gptk.random import draw_seed

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Result = tuple[Tensor | None, Tensor | None]


def grad_norm(grads: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The L2 norm of all gradients together: 0-dim float64, no overflow for 100 x 1e20."""
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    impl = resolve("adamw", backend, grads[0])
    if not is_reference(impl):
        check_addresses("grad_norm", grads)
    return impl.norm([readable(g) for g in grads])


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
    stochastic_rounding: bool = False,
    seed: int | None = None,
    rows: Sequence[int] | None = None,
    norm: Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """p = (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps), for all parameters in one call.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: equal shapes, any layout, one device.
        step: 0-dim float32 tensors there, updates done so far; each advances by one.
        lr, weight_decay: one value, or one per parameter; numbers or 0-dim tensors.
        max_grad_norm: clip all gradients together to this L2 norm.
        grad_scale: divide gradients by it. found_inf: non-zero skips the update.
        masters: float32 copies of 16-bit parameters, updated first and rounded into them. Where
            a parameter is not its master's rounding, it was changed since, and its value wins.
        stochastic_rounding: bfloat16 parameters, computed in float32, are rounded up or down with
            the probability of the distance (gptk.random.round_stochastically), so that updates
            far below an ulp add up without a master. Other dtypes but float16 are not concerned.
        seed: 64-bit seed of the rounding (None: drawn from torch's default generator). The bits
            are a function of (seed, row, step, element), equal for every backend.
        rows: each parameter's row of random numbers (None: its place in the list).
        norm: the unscaled gradients' norm where known (several calls clipped together).
        backend: auto, torch, triton or cpp.

    Returns: (norm, skipped): the gradients' norm before clipping (None without max_grad_norm), and
        whether nothing was changed because a gradient was not finite (None if never asked).

    Raises:
        ValueError: lists, shapes, dtypes or devices that do not fit together; stochastic rounding
            with masters, or of float16 parameters.
        Unsupported: the named backend cannot run them.
        Nothing was changed then.
    """
    run = plan(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        masters=masters,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        rows=rows,
        backend=backend,
    )
    return run(norm)


def plan(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Sequence[Tensor],
    *,
    lr: float | Tensor | Sequence[float | Tensor],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Sequence[float],
    max_grad_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    masters: Sequence[Tensor | None] | None,
    stochastic_rounding: bool,
    seed: int | None,
    rows: Sequence[int] | None,
    backend: str | None,
) -> Callable[[Tensor | None], Result]:
    """All that adamw_ refuses, refused now; what it does, given `norm`, in the function returned.

    So whoever makes several calls can know that none will fail before the first changes anything.
    """
    if not params:
        return lambda norm: (norm, found_inf)
    count, device = len(params), params[0].device
    impl = resolve("adamw", backend, params[0])
    rates, decays = (_scalars(x, count, device) for x in (lr, weight_decay))
    kept = [None] * count if masters is None else list(masters)
    places: Sequence[int] = range(count) if rows is None else rows
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    others = {"step": step, "masters": kept, "lr": rates, "weight_decay": decays, "rows": places}
    _check({**lists, **others})
    if not is_reference(impl):
        check_addresses("adamw_", params, grads, exp_avgs, exp_avg_sqs, step)
    for dtype in {p.dtype for p in params}:
        resolve("adamw", backend, params[0], dtype)
    rounding = None
    if stochastic_rounding:
        _check_rounding(params, kept)
        rounding = (draw_seed() if seed is None else seed, places)

    @torch.no_grad()
    def run(norm: Tensor | None) -> Result:
        wait = device.type == "cpu"  # a copy to it that does not wait is read too early
        norm, scale, found = (  # a kernel follows their addresses too
            None if x is None else x.to(device, non_blocking=not wait)
            for x in (norm, grad_scale, found_inf)
        )
        dense = [readable(g) for g in grads]
        own = norm is None and max_grad_norm is not None
        if own:
            norm = impl.norm(dense)
        norm, skip, multiplier = impl.factors(norm, own, scale, found, max_grad_norm)
        changed = (params, exp_avgs, exp_avg_sqs, kept)
        work = [[None if t is None else t.contiguous() for t in ts] for ts in changed]
        numbers = (*betas, eps, multiplier, skip, rounding)
        impl.update(work[0], dense, *work[1:], list(step), rates, decays, *numbers)
        if not is_reference(impl):  # kernels write behind autograd's back
            increment_version([t for ts in (*work, step) for t in ts if t is not None])
        for originals, copies in zip(changed, work, strict=True):
            for original, copy in zip(originals, copies, strict=True):
                if original is not None and copy is not None and original is not copy:
                    original.copy_(copy)
        return norm, skip

    return run


def _scalars(values: Any, count: int, device: torch.device) -> list[float | Tensor]:
    """One for each parameter; a tensor stays on the host, where it is read, or comes to them."""
    each = list(values) if isinstance(values, Sequence) else [values] * count
    moved = {id(x): x for x in each if isinstance(x, Tensor) and x.device.type != "cpu"}
    moved = {key: x.to(device, non_blocking=True) for key, x in moved.items()}  # each once
    return [moved.get(id(x), x) for x in each] if moved else each


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
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        odd = {t.dtype for t in lists[name]}.difference(FLOATS)
        if odd:
            i = next(i for i, t in enumerate(lists[name]) if t.dtype in odd)
            allowed = ", ".join(map(str, FLOATS))
            raise ValueError(f"adamw_: {name}[{i}] is {lists[name][i].dtype}, not one of {allowed}")
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


def _check_rounding(params: Sequence[Tensor], masters: Sequence[Tensor | None]) -> None:
    for i, (p, master) in enumerate(zip(params, masters, strict=True)):
        if master is not None:
            raise ValueError(
                f"adamw_: masters[{i}] with stochastic_rounding=True: a parameter has a float32 "
                "master or is rounded stochastically, not both"
            )
        if p.dtype == torch.float16:
            raise ValueError(
                f"adamw_: stochastic_rounding=True for params[{i}] of torch.float16: it rounds to "
                "torch.bfloat16 only; give float16 parameters masters"
            )
        if p.numel() > 2**34:  # a counter's word holds a quarter of the element's index
            raise ValueError(
                f"adamw_: stochastic_rounding=True for the {p.numel()} elements of params[{i}]: "
                "random numbers are numbered up to 2**34"
            )


def _same(name: str, trait: str, got: list[Any], right: list[Any]) -> None:
    if got != right:
        i = next(i for i, pair in enumerate(zip(got, right, strict=True)) if pair[0] != pair[1])
        has, wants = (tuple(x) if isinstance(x, torch.Size) else x for x in (got[i], right[i]))
        raise ValueError(f"adamw_: {name}[{i}] has {trait} {has}, not {wants}")
