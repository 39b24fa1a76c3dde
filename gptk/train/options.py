"""The command line of `gptk train`: tyro builds it from the dataclasses of config.py.

Before tyro sees the arguments they are brought into one form and checked here, so that a wrong
one gives a single sentence with the flag, the value and what is allowed, and `--bias=False`,
`--resume` without a value and nanoGPT's underscores mean what they say.
"""

import contextlib
import dataclasses
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptk.train.config import (
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
    flags = _split(argv)
    explicit: dict[str, Any] = {}
    preset = flags.get("preset")
    if "config" in flags:
        explicit, file_preset = read_config_file(flags["config"])
        preset = preset or file_preset
    base = build(preset or "laptop", explicit)
    for name, value in flags.items():
        _check_value(name, value)
    options = _tyro([_word(name, value) for name, value in flags.items()], base)
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
            raise ConfigError(f"--config {path}: {_unknown(flag(name))}")
    return check_types(fields), preset


def _kind(name: str) -> type:
    return KINDS.get(name, bool if name == "extend" else str)


def _known() -> list[str]:
    return ["preset", "config", "resume", "extend", *FIELDS]


def _unknown(option: str) -> str:
    """The sentence for an option that does not exist, with the one that was probably meant."""
    name = option.removeprefix("--").replace("_", "-").lower()
    names = [n.replace("_", "-") for n in _known()]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    meant = NANOGPT_NAMES.get(name) or (close[0] if close else None)
    hint = f"did you mean --{meant}?" if meant else "see gptk train --help"
    return f"there is no option {option}; {hint}"


def _split(argv: list[str]) -> dict[str, str]:
    """{field: raw value}; only the first '=' splits; a repeated flag counts the last time."""
    flags: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"unexpected argument {word!r}; see gptk train --help")
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_")
        negated = name.removeprefix("no_")
        if name not in _known() and negated != name and _kind(negated) is bool:
            flags[negated] = "False"
            if equals:
                raise ConfigError(f"{option} takes no value, but got {value!r}")
            continue
        if name not in _known():
            raise ConfigError(_unknown(option))
        if not equals:
            next_is_value = bool(words) and not words[0].startswith("--")
            if _kind(name) is bool:
                value = words.pop(0) if next_is_value and _is_bool(words[0]) else "True"
            elif next_is_value:
                value = words.pop(0)
            elif name != "resume":
                wanted = describe(name) if name in FIELDS else "a value"
                raise ConfigError(f"{option}: the value is missing; must be {wanted}")
        flags[name] = value
    return flags


def _is_bool(word: str) -> bool:
    return word.lower() in ("true", "false", "yes", "no", "1", "0")


def _check_value(name: str, value: str) -> None:
    """ConfigError unless `value` can be read as the field's type."""
    kind = _kind(name)
    good = _is_bool(value) if kind is bool else True
    if kind in (int, float):
        good = False
        with contextlib.suppress(ValueError):
            kind(value)
            good = True
    if name in FIELDS and value == "":
        good = False
    if not good:
        wanted = describe(name) if name in FIELDS else "True or False"
        raise ConfigError(f"{flag(name)} {value}: must be {wanted}")
    choices = {"tokenizer", "backend", "dtype"} & {name}
    if choices and value not in describe(name).removeprefix("one of ").split(", "):
        close = difflib.get_close_matches(value, describe(name).split()[2:], n=1)
        hint = f"; did you mean {close[0].strip(',')}?" if close else ""
        raise ConfigError(f"{flag(name)} {value}: must be {describe(name)}{hint}")


def _word(name: str, value: str) -> str:
    if _kind(name) is bool:
        on = value.lower() in ("true", "yes", "1")
        return f"--{'' if on else 'no-'}{name.replace('_', '-')}"
    return f"{flag(name)}={value}"


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
