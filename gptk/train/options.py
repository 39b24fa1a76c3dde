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
    replace,
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
    """Where the other settings come from, and what is done with them."""

    config: str | None = None
    """JSON file of settings (a run's config.json, or {"n_layer": 2, ...}); flags are stronger."""
    resume: str | None = None
    """Continue a run, bit for bit: --resume RUN, or --out RUN --resume."""
    extend: bool = False
    """With --resume: let --max-steps grow; this stretches the learning-rate schedule."""
    breakdown: bool = False
    """Instead of training, print where a step's time goes: up to 10 steps, nothing is kept."""


@dataclass(frozen=True)
class Options(TrainConfig):
    """Train a GPT."""

    preset: str = "laptop"
    """Where to start: laptop (minutes on a CPU), shakespeare (nanoGPT's, a GPU), gpt2 (124M)."""
    start: StartConfig = dataclasses.field(default_factory=StartConfig)


FLAGS = Flags(
    verb="train",
    kinds={"preset": str, "config": str, "resume": str, "extend": bool, "breakdown": bool, **KINDS},
    describe=describe,
    choices=CHOICES,
    optional_value=("resume",),
    hints=NANOGPT_NAMES,
    stray="data",
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
    notes: tuple[str, ...] = ()
    """Lines about settings that have no effect."""
    breakdown: bool = False
    """Measure steps instead of training."""


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
    # texts are taken as they are: "None" is a name like any other
    texts = {name: value for name, value in flags.items() if FLAGS.kinds[name] is str}
    others = {name: value for name, value in flags.items() if name not in texts}
    options = _tyro(FLAGS.words(others), base)
    explicit |= {name: _get(options, name) for name in others if name in FIELDS}
    explicit |= {name: value for name, value in texts.items() if name in FIELDS}
    if preset is not None:
        explicit["preset"] = preset
    config = TrainConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(base)})
    config = replace(config, {name: value for name, value in texts.items() if name in FIELDS})
    resume = _resume_folder(texts.get("resume"), config.run.out)
    extend = options.start.extend
    if extend and resume is None:
        raise ConfigError("--extend is for a run that goes on: add --resume RUN")
    breakdown = options.start.breakdown
    if extend and breakdown:
        raise ConfigError("--breakdown keeps no step, so there is nothing to extend; leave one out")
    notes = []
    if breakdown and config.run.out is not None and resume is None:
        notes.append("note: --out has no effect, for --breakdown writes nothing")
    if "vocab_size" in flags and config.data.tokenizer != "bpe" and resume is None:
        kind = config.data.tokenizer
        notes.append(f"note: --vocab-size has no effect, for --tokenizer {kind} finds its own")
    return Request(
        config, explicit, resume, bool(texts.get("resume")), extend, tuple(notes), breakdown
    )


def _resume_folder(resume: str | None, out: str | None) -> Path | None:
    """The run to go on with, None for a new one; `resume` is "" where --resume stands alone."""
    if resume is None:
        return None
    if resume == "" and out is None:
        raise ConfigError("--resume: name the run folder, --resume RUN or --out RUN --resume")
    if resume == "":
        return Path(str(out))
    if out is not None and os.path.realpath(out) != os.path.realpath(resume):
        raise ConfigError(
            f"--resume {resume} and --out {out}: a run continues in its own folder, so leave out "
            "--out"
        )
    path = Path(os.path.abspath(resume))
    if path.parent.name == "checkpoints" and path.name.startswith("step-"):
        run = Path(resume).parent.parent
        raise ConfigError(
            f"--resume {resume}: that is a checkpoint, and a run goes on from its newest one; "
            f"name the run, --resume {run}"
        )
    return Path(resume)


def read_config_file(path: str) -> tuple[dict[str, Any], str | None]:
    """The flat fields and the preset of a JSON file, with or without component groups."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: must hold a JSON object")
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    preset = flat.pop("preset", None)
    fields = {key.replace("-", "_"): value for key, value in flat.items()}
    for name in fields:
        if name in FLAGS.kinds and name not in FIELDS:
            raise ConfigError(f"--config {path}: {flag(name)} belongs on the command line")
        if name not in FIELDS:
            raise ConfigError(f"--config {path}: {FLAGS.unknown(flag(name))}")
    try:
        checked = check_types(fields)
        for name, value in {"preset": preset, **checked}.items():
            if value is not None and name in CHOICES and value not in CHOICES[name]:
                raise ConfigError(f"{flag(name)} {value}: must be {describe(name)}")
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if _is_a_run(Path(path).parent, checked.get("out")):
        del checked["out"]  # the settings of that run, not its place
    return checked, preset


def _is_a_run(folder: Path, out: str | None) -> bool:
    """Whether a settings file in `folder` that names the folder `out` is a run's own."""
    if not out:
        return False
    has_run = (folder / "lock").exists() or (folder / "checkpoints").is_dir()
    return has_run or os.path.realpath(out) == os.path.realpath(folder)


def _get(options: Options, name: str) -> Any:
    return getattr(getattr(options, OWNER[name]), name)


def _tyro(args: list[str], base: TrainConfig) -> Options:
    import tyro

    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_optional_text)
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    os.environ.setdefault("COLUMNS", "100")  # tyro's width where there is no terminal
    return tyro.cli(
        Options,
        prog="gptk train",
        args=args,
        default=Options(**values),
        config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
    )


def _optional_text(info: Any) -> Any:
    """How the help shows a setting that may be unset: STR or FLOAT, "unset" instead of None."""
    import tyro

    optional = {str | None: ("PATH", str), float | None: ("FLOAT", float)}
    if info.type not in optional:
        return None
    metavar, kind = optional[info.type]
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: ["unset" if value is None else str(value)],
    )
