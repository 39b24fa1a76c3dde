"""The run folder: who may write to it, and whether a resumed run is the same run.

config.json · metrics.jsonl · checkpoints/step-N/ · tokenizer.json · loss.png · lock
"""

import contextlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptk.train import checkpoint, config
from gptk.train.config import ConfigError, TrainConfig, flag
from gptk.train.options import Request

CONFIG, CHECKPOINTS, LOCK = "config.json", "checkpoints", "lock"
FREE = ("data", "out", "eval_interval", "eval_tokens", "save_interval", "backend", "device")
"""Fields that may change on resume: the data is compared by its hash, the others do not enter the
weights (another backend or device rounds differently, which is said)."""


def prepare(request: Request) -> tuple[Path, TrainConfig]:
    """The run folder, made if need be, and the resolved configuration of the run.

    Raises:
        ConfigError: the folder is taken, missing, or not writable; or a resumed run would not be
            the same run, with old and new value of every field that differs.
    """
    if request.resume is not None:
        stored = _stored_config(request.resume, request.resume_must_exist)
        if stored is not None:
            resumed = _resumed_config(stored, request)
            return _writable(request.resume), resumed
    resolved = config.resolve(request.config)
    if resolved.run.out is None:
        folder = _next_free(resolved.preset)
        resolved = config.replace(resolved, {"out": str(folder)})
    else:
        folder = Path(resolved.run.out)
        if request.resume is None and (folder / CONFIG).exists():
            raise ConfigError(
                f"--out {folder}: a run is there already; add --resume to continue it or name "
                "another folder (nothing is ever overwritten)"
            )
    return _writable(folder), resolved


def _next_free(preset: str) -> Path:
    """runs/PRESET-N for the first N whose folder could be made here and now."""
    for n in itertools.count(1):
        folder = Path("runs") / f"{preset}-{n}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"--out {folder}: cannot be made ({error.strerror})") from None
        return folder
    raise AssertionError


def _writable(folder: Path) -> Path:
    """`folder`, after a file was really written there; before step 1, not at the first save."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise ConfigError(f"--out {folder}: cannot be written to ({error.strerror})") from None
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
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
                f"--out {folder}: in use by another run ({file.read().strip()}); stop that one "
                "or name another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def save_config(folder: Path, resolved: TrainConfig) -> None:
    """Write config.json."""
    checkpoint.replace_json(folder / CONFIG, config.to_json(resolved))


def _stored_config(folder: Path, must_exist: bool) -> TrainConfig | None:
    """The configuration of the run in `folder`; None if there is none and that is allowed."""
    path = folder / CONFIG
    if not path.exists():
        if must_exist:
            raise ConfigError(f"--resume {folder}: no run is there ({path} does not exist)")
        return None
    try:
        return config.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume {folder}: {path} cannot be used ({error})") from None


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


def low_space(folder: Path, checkpoint_folder: Path) -> str | None:
    """A warning if the disk has no room for the two further checkpoints that a run needs."""
    size = sum(file.stat().st_size for file in checkpoint_folder.iterdir())
    free = shutil.disk_usage(folder).free
    if free >= 2 * size:
        return None
    return f"{folder} has {free / 1e6:.0f} MB free; checkpoints need up to {2 * size / 1e6:.0f} MB"
