"""AdamW over the fused op; its state is torch.optim.AdamW's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptk.ops.adamw import adamw_, grad_norm


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter 2019), all parameters in one fused call.

    16-bit parameters keep float32 masters in the state, so small updates are not lost. A
    non-finite gradient norm (with max_grad_norm) or found_inf leaves everything as it was:
    `skipped` says so, `grad_norm` is the norm before clipping.
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
            betas=betas,
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
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name}={value} must be at least 0")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas={betas} must lie in [0, 1)")
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm={max_grad_norm} must be above 0, or None")
        super().__init__(params, defaults)
        self.max_grad_norm, self.backend = max_grad_norm, backend
        self.grad_norm: Tensor | None = None
        self.skipped = torch.zeros((), dtype=torch.bool)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches: dict[Any, list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse or not p.is_floating_point():
                        raise ValueError("AdamW takes dense, real floating-point parameters only")
                    key = (p.device, p.dtype, group["betas"], group["eps"])
                    batches.setdefault(key, []).append((p, p.grad, group))
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        norm = None
        if self.max_grad_norm is not None and len(batches) > 1:
            norms = [
                grad_norm([g for _, g, _ in b], backend=self.backend) for b in batches.values()
            ]
            norm = torch.stack(norms).square().sum().sqrt() / (1.0 if scale is None else scale)
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
            where = p.device if p.device.type != "cpu" else None  # the kernel advances it there
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            state["exp_avg"] = torch.zeros_like(p, dtype=kind)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=kind)
        if kind != p.dtype and "master" not in state:
            state["master"] = p.detach().float()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state or torch.optim.AdamW's.

        Moments and masters of 16-bit parameters stay float32 (torch's loader would round them).
        Raises ValueError for options that are not AdamW's own: amsgrad, maximize.
        """
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"the stored state has {option}=True, which is not supported")
            if group.get("decoupled_weight_decay") is False:
                raise ValueError("the stored state is Adam's: its weight decay is not decoupled")
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            stored = state_dict["state"].get(i)
            if stored is None:
                continue
            state = self.state[p]
            if not isinstance(state["step"], Tensor):
                state["step"] = torch.tensor(float(state["step"]))
            state["step"] = state["step"].detach().clone().to(torch.float32)
            if p.dtype.itemsize == 2:
                for name in ("exp_avg", "exp_avg_sq", "master"):
                    if name in stored:
                        state[name] = stored[name].to(p.device, torch.float32, copy=True)
