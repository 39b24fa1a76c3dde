"""AdamW over the fused op; its state is torch.optim.AdamW's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptk.ops.adamw import grad_norm, plan
from gptk.random import draw_seed

# torch's options that would change the update, or promise what the kernels do not keep. foreach
# and fused choose among torch's own loops and mean nothing here.
REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")

# Options of a group that torch's AdamW does not have: it keeps them and does not look at them.
OWN = ("stochastic_rounding", "seed")


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter 2019), all parameters in one fused call.

    16-bit parameters keep float32 masters in the state, so small updates are not lost. With
    stochastic_rounding=True bfloat16 parameters have none, 4 bytes less for each element: they are
    rounded up or down at random, right on average (gptk.random.round_stochastically; Zamirai et al.
    2020, https://arxiv.org/abs/2010.06192); float32 and float64 parameters of the group are not
    concerned, float16 is refused. Its random numbers are a function of the group's `seed` (None:
    drawn once from torch's default generator), the parameter's number in the state dict and its
    step. Both options are the group's, as lr is, so they are in the state dict, and a resumed run
    has the bits of an uninterrupted one; torch.optim.AdamW keeps them when it loads it.

    A non-finite gradient norm (with max_grad_norm) or found_inf leaves everything as it was:
    `skipped` says so, `grad_norm` is the norm before clipping, both of the last step. Options of
    torch's AdamW that would be ignored (amsgrad, maximize, ...) raise ValueError in any group.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=False,
            maximize=False,
            foreach=None,
            capturable=False,
            differentiable=False,
            fused=None,
            decoupled_weight_decay=True,
            stochastic_rounding=stochastic_rounding,
            seed=draw_seed() if stochastic_rounding and seed is None else seed,
        )
        _check_group(defaults)
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm={max_grad_norm} must be above 0, or None")
        super().__init__(params, defaults)
        self.max_grad_norm, self.backend = max_grad_norm, backend
        self._forget()

    def _forget(self) -> None:
        self.grad_norm: Tensor | None = None
        self.skipped = torch.zeros((), dtype=torch.bool, device="cpu")

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("max_grad_norm", "backend")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["betas"] = tuple(group["betas"])  # JSON makes lists of tuples
            for name in OWN:  # of a pickle that is older than these options
                group.setdefault(name, self.defaults.get(name))
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError for options that would be ignored and for parameters given twice."""
        group = {**self.defaults, **param_group}
        _check_group(group)
        params = param_group["params"]
        if not isinstance(params, set):  # a set is torch's to refuse
            params = [params] if isinstance(params, Tensor) else list(params)
            param_group["params"] = params
            tensors = [p[1] if isinstance(p, tuple) else p for p in params]
            if len({id(p) for p in tensors}) < len(params):
                raise ValueError("a parameter group holds the same parameter more than once")
            if group["stochastic_rounding"] and any(p.dtype == torch.float16 for p in tensors):
                raise ValueError(
                    "stochastic_rounding=True rounds to bfloat16; put float16 parameters into a "
                    "group with stochastic_rounding=False"
                )
        super().add_param_group(param_group)
        param_group["betas"] = tuple(param_group["betas"])
        _draw_seed(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; of none if one of them is refused."""
        self._forget()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        batches = self._batches()
        states: dict[Tensor, dict[str, Any]] = {}
        plans = []
        for (_, _, betas, eps, seed), rows in batches.items():
            numbers, params, grads, groups = zip(*rows, strict=True)
            own = [self._state(p, seed is not None) for p in params]
            states.update(zip(params, own, strict=True))
            plans.append(
                plan(
                    params,
                    grads,
                    [s["exp_avg"] for s in own],
                    [s["exp_avg_sq"] for s in own],
                    [s["step"] for s in own],
                    lr=[group["lr"] for group in groups],
                    betas=betas,
                    eps=eps,
                    weight_decay=[group["weight_decay"] for group in groups],
                    max_grad_norm=self.max_grad_norm,
                    grad_scale=scale,
                    found_inf=found,
                    masters=[s.get("master") for s in own],
                    stochastic_rounding=seed is not None,
                    seed=seed,
                    rows=numbers,
                    backend=self.backend,
                )
            )
        norm = None
        if self.max_grad_norm is not None and len(batches) > 1:
            grads = [[g for _, _, g, _ in rows] for rows in batches.values()]
            norms = [grad_norm(g, backend=self.backend) for g in grads]
            first = norms[0].device
            norm = torch.stack([n.to(first) for n in norms]).square().sum().sqrt()
            norm = norm if scale is None else norm / scale.to(first)
        self.state.update(states)  # what could be refused has been: only now anything changes
        for run in plans:
            self.grad_norm, skipped = run(norm)
            if skipped is not None:
                self.skipped = skipped
        return loss

    def _batches(self) -> dict[Any, list[tuple[int, Tensor, Tensor, dict[str, Any]]]]:
        """(device, dtype, betas, eps, seed of the rounding or None) -> what one call can update:
        (number in the state dict, parameter, gradient, group)."""
        batches: dict[Any, list[tuple[int, Tensor, Tensor, dict[str, Any]]]] = {}
        first = 0
        for group in self.param_groups:
            _refuse(group)  # a group may be written to at any time
            _draw_seed(group)
            betas, eps = tuple(group["betas"]), group["eps"]
            seed = group["seed"] if group["stochastic_rounding"] else None
            for number, p in enumerate(group["params"], first):
                grad = p.grad
                if grad is not None:
                    if grad.is_sparse or not p.is_floating_point():
                        raise ValueError("AdamW takes dense, real floating-point parameters only")
                    own_seed = seed if p.dtype.itemsize == 2 else None
                    key = (p.device, p.dtype, betas, eps, own_seed)
                    batches.setdefault(key, []).append((number, p, grad, group))
            first += len(group["params"])
        return batches

    def _state(self, p: Tensor, stochastic: bool) -> dict[str, Any]:
        """The parameter's state, complete; a new dict where something had to be added or go."""
        state = self.state.get(p, {})
        kind = torch.float32 if p.dtype.itemsize == 2 else p.dtype
        has_master = kind != p.dtype and not stochastic
        if "exp_avg" in state and ("master" in state) == has_master:
            return state
        state = dict(state)
        if "exp_avg" not in state:
            # the kernel advances it there
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=kind)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=kind)
        if has_master:
            state.setdefault("master", p.detach().float())
        elif kind == p.dtype:
            state.pop("master", None)  # of a parameter that had 16 bits once
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state or torch.optim.AdamW's.

        Moments and masters of 16-bit parameters stay float32 (torch's loader would round them).
        What the state does not say of stochastic rounding (torch's says nothing) stays as it is.
        Raises ValueError, with nothing changed, for options that would be ignored, for tensors
        of another shape than their parameter, and for masters of parameters without.
        """
        groups = [
            {**{name: mine[name] for name in OWN}, **group}
            for mine, group in zip(self.param_groups, state_dict["param_groups"], strict=False)
        ]
        if len(groups) == len(state_dict["param_groups"]):
            state_dict = {**state_dict, "param_groups": groups}
        pairs = []
        params = (p for group in self.param_groups for p in group["params"])
        for group in state_dict["param_groups"]:
            _check_group({**self.defaults, **group})
            for i, p in zip(group["params"], params, strict=False):
                if stored := state_dict["state"].get(i):
                    _check_state(i, stored, p, group.get("stochastic_rounding", False))
                    pairs.append((i, p))
        super().load_state_dict(state_dict)  # which refuses other numbers of parameters
        for i, p in pairs:
            stored, state = state_dict["state"][i], self.state[p]
            step = torch.as_tensor(stored["step"]).detach().reshape(())
            state["step"] = step.to(p.device, torch.float32, copy=True)
            if p.dtype.itemsize == 2:
                for name in ("exp_avg", "exp_avg_sq", "master"):
                    if name in stored:
                        state[name] = stored[name].to(p.device, torch.float32, copy=True)


def _refuse(group: dict[str, Any]) -> None:
    """ValueError for an option of the group that the kernels would ignore."""
    for option in REFUSED:
        if group.get(option):
            raise ValueError(f"gptk.optim.AdamW has no {option}={group[option]}; set it to False")
    if not group.get("decoupled_weight_decay", True):
        raise ValueError("decoupled_weight_decay=False is Adam's weight decay, not AdamW's")
    for option in ("max_grad_norm", "backend"):
        if option in group:
            raise ValueError(f"{option} belongs to the whole optimizer, not to a parameter group")


def _check_group(group: dict[str, Any]) -> None:
    _refuse(group)
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name}={group[name]} must be at least 0")
    seed = group["seed"]
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**64):
        raise ValueError(f"seed={seed} must be an int of 64 bits, or None")
    betas = group["betas"]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1)")


def _draw_seed(group: dict[str, Any]) -> None:
    if group["stochastic_rounding"] and group["seed"] is None:
        group["seed"] = draw_seed()


def _check_state(index: int, stored: dict[str, Any], p: Tensor, stochastic: bool) -> None:
    """ValueError if the stored state cannot be that of p."""
    for name in ("step", "exp_avg", "exp_avg_sq"):
        if name not in stored:
            raise ValueError(f"the stored state of parameter {index} has no {name}")
    for name in ("exp_avg", "exp_avg_sq", "master"):
        if name in stored and stored[name].shape != p.shape:
            raise ValueError(
                f"the stored {name} of parameter {index} has shape {tuple(stored[name].shape)}, "
                f"the parameter {tuple(p.shape)}"
            )
    if torch.as_tensor(stored["step"]).numel() != 1:
        raise ValueError(
            f"the stored step of parameter {index} has shape {tuple(stored['step'].shape)}, not ()"
        )
    if stochastic and "master" in stored and p.dtype.itemsize == 2:
        raise ValueError(
            f"the stored state of parameter {index} has a float32 master, which "
            "stochastic_rounding=True does without: load it into an optimizer that has masters, or "
            "take the masters out"
        )
