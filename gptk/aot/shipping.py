"""The configurations that ship: launches of every Triton kernel at the sizes people train at.

A case is a name and a function that launches kernels through an op's own forward and backward.
Sizes that choose a configuration (head size, row width, vocabulary, dtype, flags) are real ones;
the number of rows, which chooses nothing, is small.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SEED = 2**40 + 77
Launches = Callable[[], object]


def cases() -> dict[str, Launches]:
    """Name -> launches, all of them; names start with the op."""
    found: dict[str, Launches] = {}
    for part in (_attention(), _layer_norm(), _gelu(), _linear(), _cross_entropy(), _adamw()):
        found |= dict(part)
    return found


Named = Iterator[tuple[str, Launches]]


def _attention() -> Named:
    plain: dict[str, Any] = {"causal": True, "dropout_p": 0.0, "window": None}
    plain |= {"group": 1, "packed": False}
    variants: dict[str, dict[str, Any]] = {
        "causal": plain,
        "causal dropout": {**plain, "dropout_p": 0.1},
        "full": {**plain, "causal": False},
        "window, 4 heads share k, v": {**plain, "window": 1024, "group": 4},
        "packed, 4 heads share k, v": {**plain, "group": 4, "packed": True},
    }
    for D in (64, 128, 256):
        for name, variant in variants.items():
            yield f"attention D {D} {name} bf16", partial(attend, D, torch.bfloat16, **variant)
    yield "attention D 64 causal fp16", partial(attend, 64, torch.float16, **plain)
    for D in (64, 128):
        for name in ("causal", "causal dropout"):
            case = f"attention D {D} {name} fp32"
            yield case, partial(attend, D, torch.float32, **variants[name])

    for D in (64, 128):
        yield f"attention D {D} decode, 4 heads share k, v bf16", partial(_decode, D)


def _decode(D: int) -> None:
    from gptk.ops.attention import triton_impl as attention

    q = torch.zeros((1, 1, 8, D), dtype=torch.bfloat16).transpose(1, 2)
    k = torch.zeros((1, 4096, 2, D), dtype=torch.bfloat16).transpose(1, 2)
    attention.forward(q, k, k, True, D**-0.5, 0.0, SEED, None)


def attend(
    D: int,
    dtype: torch.dtype,
    causal: bool,
    dropout_p: float,
    window: int | None,
    group: int,
    packed: bool,
) -> None:
    from gptk.ops.attention import triton_impl as attention
    from gptk.ops.attention.ranges import ranges

    T = 64 if window is None else 2 * window
    q = torch.zeros((1, T, 4, D), dtype=dtype).transpose(1, 2)
    k = torch.zeros((1, T, 4 // group, D), dtype=dtype).transpose(1, 2)
    ends = torch.tensor([0, 24, T])
    seen = ranges((ends, ends), T, T, causal, window) if packed else None
    options = (causal, D**-0.5, dropout_p, SEED, window)
    out, lse = attention.forward(q, k, k, *options, seen)
    attention.backward(out, q, k, k, out, lse, *options, (True, True, True), ranges=seen)


def _layer_norm() -> Named:
    for N in (128, 768, 1600, 4096, 8192, 65536):
        for dtype in (torch.bfloat16, torch.float32):
            yield f"layer_norm N {N} {SHORT[dtype]}", partial(normalise, N, dtype, False, 0.0)
            name = f"layer_norm N {N} residual dropout {SHORT[dtype]}"
            yield name, partial(normalise, N, dtype, True, 0.1)


def normalise(N: int, dtype: torch.dtype, residual: bool, dropout_p: float) -> None:
    from gptk.ops.layer_norm import triton_impl as layer_norm

    x, w = torch.zeros((4, N), dtype=dtype), torch.ones(N)
    added = x if residual else None
    y, h, mean, rstd = layer_norm.forward(x, w, w, 1e-5, added, dropout_p, SEED)
    kept = x if h is None else h
    layer_norm.backward(
        y, h, kept, w, mean, rstd, dtype, dtype if residual else None, dropout_p, SEED,
        (True, residual, True, True),
    )  # fmt: skip


def _gelu() -> Named:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for approximate in ("none", "tanh"):
            yield f"gelu {approximate} {SHORT[dtype]}", partial(_activate, dtype, approximate)


def _activate(dtype: torch.dtype, approximate: str) -> None:
    from gptk.ops.gelu import triton_impl as gelu

    x = torch.zeros(4096, dtype=dtype)
    gelu.backward(gelu.forward(x, approximate), x, approximate)


def _linear() -> Named:
    for dtype in (torch.bfloat16, torch.float32):
        yield f"linear gelu N 3072 {SHORT[dtype]}", partial(_epilogue, dtype, "gelu", False)
        yield f"linear N 3072 {SHORT[dtype]}", partial(_epilogue, dtype, None, False)
        yield f"mlp gelu N 3072 {SHORT[dtype]}", partial(_epilogue, dtype, "gelu", True)
        yield f"mlp gelu_tanh N 3072 {SHORT[dtype]}", partial(_epilogue, dtype, "gelu_tanh", True)


def _epilogue(dtype: torch.dtype, activation: str | None, need_y: bool) -> None:
    from gptk.ops.linear import triton_impl as linear

    dy = torch.zeros((8, 3072), dtype=dtype)
    linear.activation_backward(dy, dy, activation, torch.float32, need_y)


def _cross_entropy() -> Named:
    for V in (256, 50304, 128256):
        for dtype in (torch.bfloat16, torch.float32):
            yield (
                f"cross_entropy V {V} {SHORT[dtype]}",
                partial(class_loss, V, dtype, 0.0, None, 0.0),
            )
        if V == 50304:
            softcap = partial(class_loss, V, torch.bfloat16, 0.0, 30.0, 0.0)
            yield f"cross_entropy V {V} softcap bf16", softcap
        name = f"cross_entropy V {V} smoothing, softcap, z-loss bf16"
        yield name, partial(class_loss, V, torch.bfloat16, 0.1, 30.0, 1e-4)
    yield (
        "linear_cross_entropy V 50304 fp32",
        partial(linear_loss, 768, torch.float32, PLAIN, False),
    )
    variants: dict[str, tuple[int, tuple[float, float | None, float]]] = {
        "": (768, PLAIN),
        " C 776": (776, PLAIN),  # tiles do not divide it
        " bias, smoothing, z-loss": (768, (0.1, None, 1e-4)),
        " bias, smoothing, softcap, z-loss": (768, (0.1, 30.0, 1e-4)),
    }
    for name, (C, options) in variants.items():
        case = f"linear_cross_entropy V 50304{name} bf16"
        yield case, partial(linear_loss, C, torch.bfloat16, options, options != PLAIN)


def class_loss(
    V: int, dtype: torch.dtype, smoothing: float, softcap: float | None, z_loss: float
) -> None:
    from gptk.ops.cross_entropy import triton_impl as cross_entropy

    logits, target = torch.zeros((2, V), dtype=dtype), torch.zeros(2, dtype=torch.int64)
    options = (-100, smoothing, softcap, z_loss)
    loss, lse = cross_entropy.forward(logits, target, *options)
    cross_entropy.backward(loss, logits, target, lse, *options)


PLAIN = (0.0, None, 0.0)


def linear_loss(
    C: int,
    dtype: torch.dtype,
    options: tuple[float, float | None, float],
    has_bias: bool,
) -> None:
    from gptk.ops.linear_cross_entropy import triton_impl as linear_cross_entropy

    x, target = torch.zeros((2, C), dtype=dtype), torch.zeros(2, dtype=torch.int64)
    w = torch.zeros((50304, C), dtype=dtype)
    b = w.new_zeros(50304) if has_bias else None
    loss, lse = linear_cross_entropy.forward(x, w, b, target, -100, *options)
    needs, bias_dtype = (True, True, b is not None), None if b is None else dtype
    linear_cross_entropy.backward(
        loss, x, w, b, target, lse, dtype, bias_dtype, needs, -100, *options
    )


def _adamw() -> Named:
    yield "adamw fp32", partial(_update, torch.float32, False, False)
    yield "adamw bf16", partial(_update, torch.bfloat16, False, False)
    yield "adamw fp32 masters bf16", partial(_update, torch.bfloat16, True, False)
    yield "adamw stochastic rounding bf16", partial(_update, torch.bfloat16, False, True)


def _update(dtype: torch.dtype, master: bool, stochastic: bool) -> None:
    from gptk.ops.adamw import triton_impl as adamw

    p = torch.zeros(4096, dtype=dtype)
    wide, zero = torch.zeros(4096), torch.zeros(())
    norm, skip, multiplier = adamw.factors(adamw.norm([p]), True, None, zero, 1.0)
    adamw.update(
        [p], [p], [wide], [wide], [wide if master else None], [zero], [1e-3], [0.1],
        0.9, 0.95, 1e-8, multiplier, skip, (SEED, [0]) if stochastic else None,
    )  # fmt: skip
