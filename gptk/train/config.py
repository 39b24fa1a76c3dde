"""The configuration of a training run: one dataclass per component, presets, and their checks.

The command line, `config.json` in the run folder and the resume check all come from these fields.
Where a value comes from, strongest first: flag, config file, preset, default.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from gptk.flags import UsageError


class ConfigError(UsageError):
    """A wrong setting: one sentence that names the flag, the value and what is allowed."""


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    data: str | None = None
    """Text file or folder of text files; unset: Python's own documentation, no download."""
    tokenizer: Literal["byte", "char", "bpe"] = "bpe"
    """How text becomes ids: bytes, characters, or byte-pair encoding trained on the data."""
    vocab_size: int = 1024
    """Vocabulary of the bpe tokenizer, at least 257; byte and char find their own."""


@dataclass(frozen=True)
class ModelConfig:
    """The GPT."""

    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads; --n-embd must be a multiple of it."""
    n_embd: int = 192
    """Width of the residual stream."""
    block_size: int = 128
    """Context length in tokens."""
    dropout: float = 0.0
    """Probability of dropping, from 0 to below 1."""
    bias: bool = True
    """Biases in the linear layers and LayerNorms, as in GPT-2."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then a cosine to min_lr."""

    batch_size: int = 16
    """Sequences in one micro-batch."""
    grad_accum: int = 1
    """Micro-batches summed into one optimizer step."""
    learning_rate: float = 2e-3
    """The maximum, reached at the end of the warm-up."""
    min_lr: float | None = None
    """The learning rate at the end, at most --learning-rate; unset: a tenth of it."""
    warmup_steps: int = 50
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.1
    """On matrices only, not on biases and LayerNorms."""
    beta1: float = 0.9
    """Decay of the first moment, from 0 to below 1."""
    beta2: float = 0.99
    """Decay of the second moment, from 0 to below 1."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    max_steps: int = 650
    """Optimizer steps in all."""


@dataclass(frozen=True)
class RunConfig:
    """Where it runs and what it writes."""

    out: str | None = None
    """Run folder; unset: runs/PRESET-N, the first N that is free."""
    eval_interval: int = 250
    """Optimizer steps between passes over the validation split."""
    eval_tokens: int = 0
    """First tokens of the validation split that a pass takes; 0: all (1024 in the interpreter)."""
    save_interval: int = 250
    """Optimizer steps between checkpoints."""
    seed: int = 1337
    """Seed of the initial weights, the order of the data and the dropout masks."""
    backend: Literal["auto", "torch", "triton", "cpp"] = "auto"
    """Who computes: auto takes the fastest that runs here, op by op."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of matrix products (weights stay float32); auto: bfloat16 if the hardware has it."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a training run."""

    preset: str = "laptop"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


PRESETS: dict[str, dict[str, Any]] = {
    # the dataclasses' defaults are this preset: two CPU cores, under four minutes
    "laptop": {},
    # nanoGPT's train_shakespeare_char.py on one GPU
    "shakespeare": {
        "tokenizer": "char",
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "block_size": 256,
        "dropout": 0.2,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
        "warmup_steps": 100,
        "beta2": 0.99,
        "max_steps": 5000,
        "eval_interval": 250,
        "save_interval": 250,
        "bias": False,
    },
    # GPT-2 124M; the batch is nanoGPT's half a million tokens per step
    "gpt2": {
        "tokenizer": "bpe",
        "vocab_size": 50304,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "block_size": 1024,
        "batch_size": 12,
        "grad_accum": 40,
        "learning_rate": 6e-4,
        "min_lr": 6e-5,
        "warmup_steps": 2000,
        "beta2": 0.95,
        "max_steps": 600_000,
        "eval_interval": 2000,
        "save_interval": 2000,
    },
}

# field -> (smallest, largest, is the largest itself allowed)
RANGES: dict[str, tuple[float, float, bool]] = {
    "vocab_size": (257, 2**31 - 1, True),
    "n_layer": (1, 1000, True),
    "n_head": (1, 1024, True),
    "n_embd": (1, 2**17, True),
    "block_size": (1, 2**20, True),
    "dropout": (0.0, 1.0, False),
    "batch_size": (1, 2**20, True),
    "grad_accum": (1, 2**20, True),
    "learning_rate": (0.0, 1e3, True),
    "min_lr": (0.0, 1e3, True),
    "warmup_steps": (0, 2**40, True),
    "weight_decay": (0.0, 1e3, True),
    "beta1": (0.0, 1.0, False),
    "beta2": (0.0, 1.0, False),
    "grad_clip": (0.0, math.inf, False),
    "max_steps": (1, 2**40, True),
    "eval_interval": (1, 2**40, True),
    "eval_tokens": (0, 2**40, True),
    "save_interval": (1, 2**40, True),
    "seed": (0, 2**63 - 1, True),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "preset": tuple(PRESETS),
    "tokenizer": ("byte", "char", "bpe"),
    "backend": ("auto", "torch", "triton", "cpp"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}

ADDED = ("eval_tokens",)
"""Fields that a config.json of an earlier version does not have; they take their defaults."""

GROUPS: dict[str, Any] = {
    f.name: f.default_factory for f in dataclasses.fields(TrainConfig) if f.name != "preset"
}
"""Component name -> its dataclass."""
OWNER = {f.name: group for group, cls in GROUPS.items() for f in dataclasses.fields(cls)}
"""Field name -> component that has it; field names are unique, as flags are."""
FIELDS = {f.name: f for cls in GROUPS.values() for f in dataclasses.fields(cls)}
_KINDS: dict[Any, type] = {int: int, float: float, float | None: float, bool: bool}
KINDS = {name: _KINDS.get(f.type, str) for name, f in FIELDS.items()}
"""Field name -> int, float, bool or str."""


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def build(preset: str = "laptop", *layers: dict[str, Any]) -> TrainConfig:
    """Defaults, then the preset, then each layer of flat {field: value}, the last one strongest."""
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    return replace(TrainConfig(preset=preset), PRESETS[preset], *layers)


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with what depends on other fields filled in, and every value checked."""
    if config.optim.min_lr is None:
        config = replace(config, {"min_lr": config.optim.learning_rate / 10})
    validate(config)
    return config


def replace(config: TrainConfig, *layers: dict[str, Any]) -> TrainConfig:
    """`config` with the flat {field: value} of each layer put in."""
    parts: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for layer in layers:
        for name, value in layer.items():
            parts[OWNER[name]][name] = value
    changed = {g: dataclasses.replace(getattr(config, g), **v) for g, v in parts.items() if v}
    return dataclasses.replace(config, **changed)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """{field: value} of every component, without the preset's name."""
    return {name: getattr(getattr(config, OWNER[name]), name) for name in FIELDS}


def to_json(config: TrainConfig) -> dict[str, Any]:
    """What config.json holds."""
    return dataclasses.asdict(config)


def from_json(stored: object) -> TrainConfig:
    """The configuration in a config.json, checked.

    Raises:
        ConfigError: not such a file, an unknown field, or a value of the wrong type or range.
    """
    if not isinstance(stored, dict) or not isinstance(stored.get("preset"), str):
        raise ConfigError("the stored configuration is not an object with a preset")
    layer: dict[str, Any] = {}
    for group, cls in GROUPS.items():
        part = stored.get(group)
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(part, dict) or not names - {*ADDED} <= set(part) <= names:
            raise ConfigError(f"the stored configuration's '{group}' must hold {sorted(names)}")
        layer.update(part)
    return resolve(replace(TrainConfig(preset=stored["preset"]), check_types(layer)))


def check_types(layer: dict[str, Any]) -> dict[str, Any]:
    """The flat layer with ints made floats where a float is wanted; ConfigError on other types."""
    checked = {}
    for name, value in layer.items():
        kind = KINDS[name]
        if kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if type(value) is not kind and not (value is None and FIELDS[name].default is None):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
            raise ConfigError(f"{flag(name)} {shown}: must be {describe(name)}")
        checked[name] = value
    return checked


def describe(name: str) -> str:
    """What a setting allows, for messages: 'an integer from 1 to 1000'."""
    if name in CHOICES:
        return "one of " + ", ".join(CHOICES[name])
    if name in RANGES:
        low, high, closed = RANGES[name]
        if name == "learning_rate":  # 0 is in its range, and refused by a sentence of its own
            return f"a number above 0 and up to {high:g}"
        if high == math.inf:
            return f"a finite number, at least {low:g}"
        if KINDS[name] is int:
            far = high >= 2**31 - 1
            return (
                f"an integer, at least {low} and at most {high}"
                if far
                else (f"an integer from {low} to {high}")
            )
        return f"a number from {low:g} to {high:g}" + ("" if closed else f" (below {high:g})")
    if KINDS.get(name, bool if name in ("extend", "breakdown") else str) is bool:
        return "True or False"
    return "auto, cpu, cuda, cuda:N (N up to 999) or mps" if name == "device" else "a path"


def check_device(device: str) -> None:
    """ConfigError unless this is the name of a device, here or elsewhere."""
    if re.fullmatch("auto|cpu|mps|cuda(:[0-9]{1,3})?", device) is None:
        raise ConfigError(f"--device {device}: must be {describe('device')}")


def validate(config: TrainConfig) -> None:
    """Raise ConfigError unless every value is in range and they fit each other."""
    values = flatten(config)
    for name, (low, high, closed) in RANGES.items():
        value = values[name]
        if not (low <= value and (value <= high if closed else value < high)):
            raise ConfigError(f"{flag(name)} {value}: must be {describe(name)}")
    for name in CHOICES.keys() & values.keys():
        if values[name] not in CHOICES[name]:
            raise ConfigError(f"{flag(name)} {values[name]}: must be {describe(name)}")
    check_device(values["device"])
    for name in ("data", "out"):
        if values[name] == "":
            raise ConfigError(f"{flag(name)} is empty: must be {describe(name)}")
    if values["n_embd"] % values["n_head"]:
        raise ConfigError(
            f"--n-embd {values['n_embd']} is not divisible by --n-head {values['n_head']}: "
            "every head takes an equal share of the width"
        )
    if values["n_embd"] // values["n_head"] > 256:
        raise ConfigError(
            f"--n-embd {values['n_embd']} with --n-head {values['n_head']} makes heads of "
            f"{values['n_embd'] // values['n_head']}: at most 256 is allowed"
        )
    if values["learning_rate"] == 0.0:
        raise ConfigError("--learning-rate 0.0: must be more than 0, else nothing is learned")
    if values["min_lr"] > values["learning_rate"]:
        raise ConfigError(
            f"--min-lr {values['min_lr']:g}: must be at most --learning-rate "
            f"{values['learning_rate']:g}"
        )
