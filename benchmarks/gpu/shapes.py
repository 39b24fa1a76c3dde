"""Sizes of real models (cases for each op's own cases.py), and their tiny doubles for a dry run."""

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Values = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

T = 1024


def parameters(layers: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of GPT-2's parameters at 768 channels, so many of its 12 layers."""
    attention = ((768,), (768,), (2304, 768), (2304,), (768, 768), (768,))
    mlp = ((768,), (768,), (3072, 768), (3072,), (768, 3072), (768,))
    return ((50304, 768), (1024, 768), *(attention + mlp) * layers, (768,), (768,))


REAL: dict[str, dict[str, Values]] = {
    "layer_norm": {
        "gpt2": dict(shape=(4, T, 768), residual=True),
        "gpt2_dropout": dict(shape=(4, T, 768), residual=True, dropout_p=0.1),
        "gpt2_xl": dict(shape=(4, T, 1600), residual=True),
        "llama_8b": dict(shape=(2, T, 4096)),
    },
    "attention": {
        "gpt2": dict(B=4, H=12, Tq=T, Tk=T, D=64, causal=True),
        "gpt2_dropout": dict(B=1, H=12, Tq=T, Tk=T, D=64, causal=True, dropout_p=0.1),
        "gpt2_xl": dict(B=2, H=25, Tq=T, Tk=T, D=64, causal=True),
        "llama_8b": dict(B=1, H=32, Hkv=8, Tq=T, Tk=T, D=128, causal=True),
    },
    "gelu": {
        "gpt2": dict(shape=(4, T, 3072), approximate="tanh"),
        "gpt2_erf": dict(shape=(4, T, 3072)),
        "gpt2_xl": dict(shape=(4, T, 6400), approximate="tanh"),
        "llama_8b": dict(shape=(2, T, 14336), approximate="tanh"),
    },
    "linear": {
        "gpt2": dict(shape=(4, T, 768), N=2304),
        "gpt2_gelu": dict(shape=(4, T, 768), N=3072, activation="gelu_tanh"),
        "gpt2_xl": dict(shape=(2, T, 1600), N=4800),
        "llama_8b": dict(shape=(1, T, 4096), N=6144, bias=False),
    },
    "mlp": {
        "gpt2": dict(shape=(4, T, 768)),
        "gpt2_xl": dict(shape=(2, T, 1600)),
        "llama_8b": dict(shape=(1, T, 4096), hidden=14336, bias=False),
    },
    "cross_entropy": {
        "gpt2": dict(N=4 * T, V=50304),
        "gpt2_ignored": dict(N=T, V=50257, ignored=0.3, label_smoothing=0.1, z_loss=1e-4),
        "llama_8b": dict(N=T, V=128256),
    },
    "linear_cross_entropy": {
        "gpt2": dict(shape=(4, T, 768), V=50304),
        "gpt2_xl": dict(shape=(2, T, 1600), V=50304),
        "llama_8b": dict(shape=(1, T, 4096), V=128256),
    },
    "adamw": {
        # two of its layers: float64 and a copy of everything, many processes at once
        "gpt2": dict(shapes=parameters(2), max_grad_norm=1.0),
    },
}

TINY: dict[str, Values] = {
    "layer_norm": dict(shape=(2, 3, 40)),
    "attention": dict(B=1, H=2, Tq=19, Tk=19, D=8),
    "gelu": dict(shape=(1, 3, 65)),
    "linear": dict(shape=(1, 5, 16), N=24),
    "mlp": dict(shape=(1, 5, 16), hidden=40),
    "cross_entropy": dict(N=6, V=130),
    "linear_cross_entropy": dict(shape=(2, 3, 16), V=130),
    "adamw": dict(shapes=((7, 9), (5,))),
}
"""What replaces the sizes in a dry run, with as many dimensions; every flag of the case stays."""


def case_names(op: str, dry: bool) -> list[str]:
    """The cases of an op; a dry run does the first and every one with a flag of its own."""
    names = list(REAL[op])
    return [n for n in names if "xl" not in n] if dry else names


def options(op: str, case: str, dry: bool) -> Values:
    real = REAL[op][case]
    if not dry:
        return real
    grouped = {"Hkv": 1} if "Hkv" in real else {}
    return {**real, **TINY[op], **grouped}


def inputs(
    op: str, case: str, dtype: torch.dtype, device: str, dry: bool, scale: float = 1.0
) -> Values:
    """Keyword arguments on the device; activations times `scale`."""
    if op == "adamw":  # its state has dtypes of its own
        return draw(op, options(op, case, dry), dtype, device)
    values = convert(_drawn(op, case, device, dry), dtype)
    return scaled(op, values, scale)


def scaled(op: str, values: Values, scale: float) -> Values:
    """The activations, not the weights, times a power of two or 5."""
    names = ("query", "key", "value") if op == "attention" else ("input",)
    return values if scale == 1.0 else {**values, **{n: values[n] * scale for n in names}}


@functools.lru_cache(maxsize=1)
def _drawn(op: str, case: str, device: str, dry: bool) -> Values:
    """Drawn once in float32: each dtype is rounded from the same."""
    return draw(op, options(op, case, dry), torch.float32, device)


def draw(op: str, sizes: Values, dtype: torch.dtype, device: str) -> Values:
    """Keyword arguments of the op's cases.py, drawn on the device."""
    module = importlib.import_module(f"gptk.ops.{op}.cases")
    with contextlib.nullcontext() if device == "cpu" else _RandomOn(device):
        drawn = module.inputs(**sizes, dtype=dtype)
    return place(drawn, device)


class _RandomOn(TorchFunctionMode):
    """Random numbers come from the device's own generator, with the seed that the CPU's had: a
    CPU takes seconds for what a GPU draws in milliseconds."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.own: dict[torch.Generator, torch.Generator] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if (given := options.get("generator")) is not None:
            if given not in self.own:
                self.own[given] = generator(self.device, given.initial_seed())
            options |= {"generator": self.own[given], "device": self.device}
        return function(*args, **options)


def generator(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def place(values: Values, device: str) -> Values:
    """The same arguments on the device, lists of tensors included."""
    return {k: _placed(v, device) for k, v in values.items()}


def _placed(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [_placed(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


def convert(values: Values, dtype: torch.dtype) -> Values:
    """The same arguments, floating-point tensors in dtype."""
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in values.items()
    }
