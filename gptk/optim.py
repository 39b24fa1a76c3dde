"""AdamW over the fused op; its state is torch.optim.AdamW's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptk.ops.adamw import adamw_, grad_norm

# torch's options that would change the update, or promise what the kernels do not keep. foreach
# and fused choose among torch's own loops and mean nothing here.
REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter 2019), all parameters in one fused call.

    16-bit parameters keep float32 masters in the state, so small updates are not lost. A
    non-finite gradient norm (with max_grad_norm) or found_inf leaves everything as it was:
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
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError for options that would be ignored and for parameters given twice."""
        _check_group({**self.defaults, **param_group})
        params = param_group["params"]
        if not isinstance(params, Tensor | set):  # a set is torch's to refuse
            params = param_group["params"] = list(params)
            ids = {id(p[1] if isinstance(p, tuple) else p) for p in params}
            if len(ids) < len(params):
                raise ValueError("a parameter group holds the same parameter more than once")
        super().add_param_group(param_group)
        param_group["betas"] = tuple(param_group["betas"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        self._forget()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches: dict[Any, list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            _refuse(group)  # a group may be written to at any time
            betas = tuple(group["betas"])
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse or not p.is_floating_point():
                        raise ValueError("AdamW takes dense, real floating-point parameters only")
                    key = (p.device, p.dtype, betas, group["eps"])
                    batches.setdefault(key, []).append((p, p.grad, group))
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        norm = None
        if self.max_grad_norm is not None and len(batches) > 1:
            norms = [
                grad_norm([g for _, g, _ in b], backend=self.backend) for b in batches.values()
            ]
            first = norms[0].device
            norm = torch.stack([n.to(first) for n in norms]).square().sum().sqrt()
            norm = norm if scale is None else norm / scale.to(first)
        for (_, _, betas, eps), rows in batches.items():
            states = [self._state(p) for p, _, _ in rows]
            self.grad_norm, skipped = adamw_(
                [p for p, _, _ in rows],
                [g for _, g, _ in rows],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [s["step"] for s in states],
                lr=[g["lr"] for _, _, g in rows],
                betas=betas,
                eps=eps,
                weight_decay=[g["weight_decay"] for _, _, g in rows],
                max_grad_norm=self.max_grad_norm,
                grad_scale=scale,
                found_inf=found,
                masters=[s.get("master") for s in states],
                norm=norm,
                backend=self.backend,
            )
            if skipped is not None:
                self.skipped = skipped
        return loss

    def _state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        kind = torch.float32 if p.dtype.itemsize == 2 else p.dtype
        if "exp_avg" not in state:
            # the kernel advances it there
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=kind)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=kind)
        if kind == p.dtype:
            state.pop("master", None)  # of a parameter that had 16 bits once
        elif "master" not in state:
            state["master"] = p.detach().float()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state or torch.optim.AdamW's.

        Moments and masters of 16-bit parameters stay float32 (torch's loader would round them).
        Raises ValueError, with nothing changed, for options that would be ignored and for tensors
        of another shape than their parameter.
        """
        for group in state_dict["param_groups"]:
            _check_group({**self.defaults, **group})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        pairs = [(i, p) for i, p in zip(ids, params, strict=False) if state_dict["state"].get(i)]
        for i, p in pairs:
            _check_state(i, state_dict["state"][i], p)
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
    betas = group["betas"]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1)")


def _check_state(index: int, stored: dict[str, Any], p: Tensor) -> None:
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
