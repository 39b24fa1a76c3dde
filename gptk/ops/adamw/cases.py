"""Cases of adamw_: what tests, benchmarks and `verify` run."""

from typing import Any

import torch

from gptk.ops.cases import normal

CASES: dict[str, dict[str, Any]] = {
    "one": dict(shapes=((3,),)),
    "mixed": dict(shapes=((5, 7), (1,), (33,), (2, 3, 4))),
    "with_empty": dict(shapes=((4,), (0,), (2, 2))),
    "clipped": dict(shapes=((65,), (8, 9)), max_grad_norm=0.5),
    "stochastic": dict(shapes=((5, 7), (2051,), (0,), (1, 3)), stochastic_rounding=True),
}
BENCH: dict[str, dict[str, Any]] = {
    "nano": dict(shapes=((65, 128),) + ((384, 128), (384,), (128, 512), (512, 128)) * 4),
    "gpt2": dict(shapes=((50304, 768),) + ((2304, 768), (768, 768), (3072, 768)) * 12),
}


def traffic(
    shapes: tuple[tuple[int, ...], ...], grad: int, param: int, state: int, master: bool = False
) -> int:
    """Bytes that an ideal update reads and writes, given the bytes of a number of each kind: g
    read; p, m, v (and the float32 master) read and written. The norm, for clipping, reads g once
    more."""
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    return numbers * (grad + 2 * (param + 2 * state + 4 * master))


def inputs(
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    max_grad_norm: float | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of adamw_; moments in float32 for 16-bit parameters, with masters, which
    bfloat16 parameters that are rounded stochastically do not have."""
    has_masters = dtype.itemsize == 2 and not stochastic_rounding
    state = torch.float32 if dtype.itemsize == 2 else dtype
    params = [normal(s, dtype, seed + i) for i, s in enumerate(shapes)]
    return {
        "params": params,
        "grads": [normal(s, dtype, seed + 100 + i) for i, s in enumerate(shapes)],
        "exp_avgs": [normal(s, state, seed + 200 + i, 0.1) for i, s in enumerate(shapes)],
        "exp_avg_sqs": [
            normal(s, state, seed + 300 + i, 0.1).square() for i, s in enumerate(shapes)
        ],
        "step": [torch.tensor(float(i)) for i in range(len(shapes))],
        "lr": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": max_grad_norm,
        "masters": [p.float() for p in params] if has_masters else None,
        "stochastic_rounding": stochastic_rounding,
        "seed": 0x9E3779B97F4A7C15,
    }
