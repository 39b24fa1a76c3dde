"""The command line of `gptk train`: tyro builds it from the dataclasses of config.py."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptk.flags import Flags
from gptk.train.config import (
    CHOICES,
    FIELDS,
    KINDS,
    OWNER,
    ConfigError,
    TrainConfig,
    build,
    check_types,
    describe,
    flag,
)

NANOGPT_NAMES = {
    "lr": "learning-rate",
    "max-iters": "max-steps",
    "warmup-iters": "warmup-steps",
    "gradient-accumulation-steps": "grad-accum",
    "out-dir": "out",
    "dataset": "data",
}
"""Names that people try, for the hint of an unknown option only."""


@dataclass(frozen=True)
class StartConfig:
    """Where the other settings come from."""

    config: str | None = None
    """JSON file of settings (a run's config.json, or {"n_layer": 2, ...}); flags are stronger."""
    resume: str | None = None
    """Continue a run, bit for bit: --resume RUN, or --out RUN --resume."""
    extend: bool = False
    """With --resume: let --max-steps grow; this stretches the learning-rate schedule."""


@dataclass(frozen=True)
class Options(TrainConfig):
    """Train a GPT."""

    preset: str = "laptop"
    """Where to start: laptop (minutes on a CPU), shakespeare (nanoGPT's, a GPU), gpt2 (124M)."""
    start: StartConfig = dataclasses.field(default_factory=StartConfig)


FLAGS = Flags(
    verb="train",
    kinds={"preset": str, "config": str, "resume": str, "extend": bool, **KINDS},
    describe=describe,
    choices=CHOICES,
    optional_value=("resume",),
    hints=NANOGPT_NAMES,
)


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    config: TrainConfig
    """Not yet resolved; with --resume it holds the presets', not the run's, unset values."""
    explicit: dict[str, Any]
    """The fields that a flag or the config file set."""
    resume: Path | None
    resume_must_exist: bool
    """The folder was named by --resume itself; with --out alone a missing one means: start."""
    extend: bool


def parse(argv: list[str]) -> Request:
    """The request in `argv` (without the verb).

    Raises:
        ConfigError: any mistake, as one sentence.
        SystemExit: 0 after --help.
    """
    if any(word in ("-h", "--help") for word in argv):
        _tyro(["--help"], TrainConfig())
    flags = FLAGS.split(argv)
    explicit: dict[str, Any] = {}
    preset = flags.get("preset")
    if "config" in flags:
        explicit, file_preset = read_config_file(flags["config"])
        preset = preset or file_preset
    base = build(preset or "laptop", explicit)
    options = _tyro(FLAGS.words(flags), base)
    for name in flags:
        if name in FIELDS:
            explicit[name] = _get(options, name)
    if preset is not None:
        explicit["preset"] = preset
    config = TrainConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(base)})
    resume = options.start.resume
    bare = resume == ""
    if bare and config.run.out is None:
        raise ConfigError("--resume: name the run folder, --resume RUN or --out RUN --resume")
    if resume and config.run.out not in (None, resume):
        raise ConfigError(
            f"--resume {resume} and --out {config.run.out}: a run continues in its own folder"
        )
    folder = config.run.out if bare else resume
    return Request(
        config,
        explicit,
        Path(folder) if folder is not None else None,
        not bare,
        options.start.extend,
    )


def read_config_file(path: str) -> tuple[dict[str, Any], str | None]:
    """The flat fields and the preset of a JSON file, with or without component groups."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: must hold a JSON object")
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    preset = flat.pop("preset", None)
    fields = {key.replace("-", "_"): value for key, value in flat.items()}
    for name in fields:
        if name not in FIELDS:
            raise ConfigError(f"--config {path}: {FLAGS.unknown(flag(name))}")
    return check_types(fields), preset


def _get(options: Options, name: str) -> Any:
    return getattr(getattr(options, OWNER[name]), name)


def _tyro(args: list[str], base: TrainConfig) -> Options:
    import tyro

    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    os.environ.setdefault("COLUMNS", "100")  # tyro's width where there is no terminal
    return tyro.cli(
        Options,
        prog="gptk train",
        args=args,
        default=Options(**values),
        config=(tyro.conf.OmitArgPrefixes,),
    )
