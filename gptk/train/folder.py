"""The run folder: who may write to it, and whether a resumed run is the same run.

config.json · metrics.jsonl · checkpoints/step-N/ · tokenizer.json · tokens-*.bin · loss.png · lock
"""

import contextlib
import itertools
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptk.train import checkpoint, config, state
from gptk.train.checkpoint import CheckpointError
from gptk.train.config import ConfigError, TrainConfig, flag
from gptk.train.options import Request

CONFIG, CHECKPOINTS, LOCK = "config.json", "checkpoints", "lock"
OF_A_RUN = (
    CONFIG,
    f"{CHECKPOINTS}/step-*",
    "metrics.jsonl",
    "tokenizer.json",
    "tokens-*.bin",
    "loss.png",
)
"""What a run leaves in its folder. A new run never starts over any of it."""
FREE = ("data", "out", "eval_interval", "eval_tokens", "save_interval", "backend", "device")
"""Fields that may change on resume: the data is compared by its hash, the others do not enter the
weights (another backend or device rounds differently, which is said)."""


def prepare(request: Request) -> tuple[Path, TrainConfig]:
    """The run folder, made if need be, and the resolved configuration of the run.

    Raises:
        ConfigError: the folder is taken, missing, or not writable; or a resumed run would not be
            the same run, with old and new value of every field that differs.
    """
    with _reachable(request):
        resolved, resumes = settings(request)
        if request.resume is not None and resumes:
            return _writable(request.resume, "--resume"), resolved
        if resolved.run.out is None:
            folder = _next_free(resolved.preset)
            return _writable(folder), config.replace(resolved, {"out": str(folder)})
        folder = Path(resolved.run.out)
        if request.resume is None:
            refuse_taken(folder)
        return _writable(folder), resolved


def settings(request: Request) -> tuple[TrainConfig, bool]:
    """The resolved configuration, and whether it is that of a run to resume. Only reads.

    Raises:
        ConfigError: there is no such run, or it would not be the same run.
    """
    with _reachable(request):
        if request.resume is not None:
            stored = _stored_config(request.resume, request.resume_must_exist)
            if stored is not None:
                return _with_whole_path(_resumed_config(stored, request)), True
        return _with_whole_path(config.resolve(request.config)), False


@contextlib.contextmanager
def _reachable(request: Request) -> Iterator[None]:
    """A path that the system cannot even look up (too long, not allowed) is a wrong setting."""
    try:
        yield
    except OSError as error:
        named = request.resume or request.config.run.out or "runs"
        option = "--resume" if request.resume_must_exist and request.resume else "--out"
        shown = named if len(str(named)) <= 80 else f"{str(named)[:77]}..."
        raise ConfigError(f"{option} {shown}: cannot be used ({error.strerror})") from None


def refuse_taken(folder: Path) -> None:
    """ConfigError if anything of a run is in the folder."""
    for pattern in OF_A_RUN:
        found = next(folder.glob(pattern), None)
        if found is not None:
            raise ConfigError(
                f"--out {folder}: a run is there already ({found.relative_to(folder)}); add "
                "--resume to continue it or name another folder (nothing is ever overwritten)"
            )


def _with_whole_path(settings: TrainConfig) -> TrainConfig:
    """The data by its absolute path, so that the run resumes from any working directory."""
    data = settings.data.data
    return settings if not data else config.replace(settings, {"data": os.path.abspath(data)})


def _next_free(preset: str) -> Path:
    """runs/PRESET-N for the first N whose folder could be made here and now."""
    for n in itertools.count(1):
        folder = Path("runs") / f"{preset}-{n}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.exists():
                continue
            raise ConfigError(
                f"--out {folder}: cannot be made ({folder.parent} is not a folder)"
            ) from None
        except OSError as error:
            raise ConfigError(f"--out {folder}: cannot be made ({error.strerror})") from None
        return folder
    raise AssertionError


def _writable(folder: Path, option: str = "--out") -> Path:
    """`folder`, after a file was really written there; before step 1, not at the first save."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise ConfigError(f"{option} {folder}: cannot be written to ({error.strerror})") from None
    return folder


@contextlib.contextmanager
def locked(folder: Path, option: str = "--out") -> Iterator[None]:
    """Hold the run's lock. The system drops it with the process, however that ends.

    Raises:
        ConfigError: another process has it; the message names it.
    """
    import fcntl

    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ConfigError(
                f"{option} {folder}: in use by another run ({file.read().strip()}); stop that one "
                "or name another folder"
            ) from None
        with contextlib.suppress(OSError):  # who holds it is a courtesy: a full disk may not say
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def remove_unused(folder: Path, made: list[Path]) -> None:
    """Remove a folder in which no run began: it holds the lock alone. `made` are the folders, the
    innermost first, that were made for it."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            for path in made:
                path.rmdir()


def missing(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist, the innermost first."""
    with contextlib.suppress(OSError):
        return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    return []


def save_config(folder: Path, resolved: TrainConfig) -> None:
    """Write config.json."""
    checkpoint.replace_json(folder / CONFIG, config.to_json(resolved))


def _stored_config(folder: Path, must_exist: bool) -> TrainConfig | None:
    """The configuration of the run in `folder`; None if there is none and that is allowed.

    A config.json that is lost or damaged is taken from the newest whole checkpoint.
    """
    path = folder / CONFIG
    try:
        return config.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        reason = f"{path} does not exist"
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{path} cannot be used ({error})"
    newest = checkpoint.newest(folder / CHECKPOINTS, lambda _: None)
    if newest is not None:
        try:
            stored = config.from_json(state.read(newest).get("config"))
        except ConfigError as error:
            raise CheckpointError(f"--resume {folder}: {reason}, {newest}: {error}") from None
        print(f"{reason}; the settings are those that {newest.name} holds")
        return stored
    if not must_exist and not path.exists():
        return None
    if must_exist and not path.exists():
        raise ConfigError(f"--resume {folder}: no run is there ({reason})")
    raise ConfigError(
        f"--resume {folder}: {reason}, and no checkpoint holds a copy; remove it to start over"
    )


def _resumed_config(stored: TrainConfig, request: Request) -> TrainConfig:
    """The stored configuration with what may change taken from the request."""
    asked = {name: v for name, v in request.explicit.items() if name not in ("preset", "out")}
    new = config.resolve(config.replace(stored, asked))
    old_values, new_values = config.flatten(stored), config.flatten(new)
    differing = {
        name: (old_values[name], new_values[name])
        for name in old_values
        if old_values[name] != new_values[name] and name not in FREE
    }
    preset = request.explicit.get("preset", stored.preset)
    if preset != stored.preset:
        differing["preset"] = (stored.preset, preset)
    old, longer = stored.optim.max_steps, new.optim.max_steps
    if request.extend and longer > old:
        differing.pop("max_steps", None)
    if differing:
        hint = ""
        if differing.keys() == {"max_steps"} and longer > old:
            hint = (
                "\n  more steps stretch the learning-rate schedule, so the steps already done "
                "would have been others; add --extend to go on all the same"
            )
        raise ConfigError(refusal({flag(n): pair for n, pair in differing.items()}) + hint)
    return new


def refusal(differing: dict[str, tuple[Any, Any]]) -> str:
    """Why a run is not resumed: old and new value of each thing that differs."""
    lines = [f"  {name}: {old} in the run, {new} now" for name, (old, new) in differing.items()]
    return "--resume refused, it would not be the same run:\n" + "\n".join(lines)
