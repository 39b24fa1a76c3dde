"""Checkpoints: published whole or not at all, verified before use, no pickle.

A checkpoint is a folder `step-N` of safetensors and JSON files. It is written under a temporary
name, every file and the folder are fsynced, `manifest.json` (size and SHA-256 of each file) comes
last, then the folder is renamed into place and its parent fsynced. A kill at any instant leaves
either the new checkpoint or the ones before it; a reader takes the newest whose hashes verify.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptk.flags import Failure

FORMAT, VERSION = "gptk-checkpoint", 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")


class CheckpointError(Failure):
    """A checkpoint cannot be written, or one cannot be used; the message says which and why."""


# ---- tensors in one file -------------------------------------------------------------------


def save_tensors(path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, replacing `path` in one step.

    The bytes go to a temporary file first: `tensors` may be views of the very file that is
    replaced, mapped into memory. On any failure `path` is as it was and no other file is left.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(flat, temporary, {"format": "pt", **metadata})
        _fsync(temporary)
        temporary.replace(path)
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


# ---- a model's tensors ---------------------------------------------------------------------


def clean_key(key: str) -> str:
    """A state-dict key without what torch.compile and DistributedDataParallel put into it."""
    key = ".".join(part for part in key.split(".") if part != "_orig_mod")
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by clean key, tied): a tensor with several keys is under the first one only,
    and `tied` maps each other key to it."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key, tensor in model.state_dict().items():
        name = clean_key(key)
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            tied[name] = seen[place]
        else:
            seen[place] = name
            tensors[name] = tensor
    return tensors, tied


def load_model(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str]) -> None:
    """Copy `tensors` into the model, all or nothing; prefixes and ties may differ.

    Raises:
        CheckpointError: keys are missing, left over or twice, or shapes differ; all are listed
            and the model is unchanged.
    """
    given: dict[str, Tensor] = {}
    problems = []
    for key, tensor in tensors.items():
        name = clean_key(key)
        if name in given:
            problems.append(f"twice: {name}")
        given[name] = tensor
    for alias, name in tied.items():
        if name in given:
            given.setdefault(alias, given[name])
    wanted, own_ties = model_tensors(model)
    for alias, name in own_ties.items():  # a checkpoint may hold either key, or both if equal
        if name not in given and alias in given:
            given[name] = given[alias]
        elif alias in given and name in given and not torch.equal(given[alias], given[name]):
            problems.append(f"tied in the model but different here: {alias}, {name}")
        given.pop(alias, None)
    problems += [f"missing: {name}" for name in wanted if name not in given]
    problems += [f"not in the model: {name}" for name in given if name not in wanted]
    for name, tensor in wanted.items():
        if name in given and given[name].shape != tensor.shape:
            have, want = tuple(given[name].shape), tuple(tensor.shape)
            problems.append(f"shape of {name}: {have} here, {want} in the model")
    if problems:
        raise CheckpointError("the weights do not fit the model: " + "; ".join(problems))
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(given[name])


# ---- a folder, published -------------------------------------------------------------------


def publish(root: Path, step: int, writers: dict[str, Callable[[Path], object]], keep: int) -> Path:
    """Write checkpoint `root/step-N` from {file name: function that writes it}; prune to `keep`.

    Raises:
        CheckpointError: it cannot be written (disk full, read-only); earlier ones are untouched.
    """
    final = root / f"step-{step}"
    temporary = root / f".tmp-step-{step}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        for name, write in writers.items():
            write(temporary / name)
            _fsync(temporary / name)
        files = {name: _measure(temporary / name) for name in writers}
        write_json(temporary / MANIFEST, {"format": FORMAT, "version": VERSION, "files": files})
        _fsync(temporary / MANIFEST)
        _fsync(temporary)
        _rename_into_place(temporary, final)
        _fsync(root)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot write {final}: {error}; the checkpoints written before are intact"
        ) from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    _prune(root, step, keep)
    return final


def _rename_into_place(temporary: Path, final: Path) -> None:
    """Rename; an occupied name (a damaged checkpoint) is swapped aside, and back on failure."""
    if not final.exists():
        temporary.rename(final)
        return
    aside = final.with_name(f".old-{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def recover(root: Path) -> None:
    """Clear up after a writer that was killed. Only for the holder of the run's lock."""
    if not root.exists():
        return
    for aside in root.glob(".old-step-*"):
        final = aside.with_name(aside.name.removeprefix(".old-"))
        if not final.exists():
            aside.rename(final)
    for rest in [*root.glob(".old-step-*"), *root.glob(".tmp-step-*")]:
        shutil.rmtree(rest)


def _prune(root: Path, published: int, keep: int) -> None:
    """Of `published` and the whole checkpoints before it, leave the newest `keep`.

    A damaged one takes no place, and what is beyond `published` or has no manifest is left
    alone: it is not this run's to remove. Renamed first, so that none is ever half there.
    """
    whole = 1  # the one just published
    for step, folder in checkpoints(root):
        if step >= published or not (folder / MANIFEST).exists():
            continue
        if whole < keep:
            whole += damage(folder) is None
            continue
        doomed = root / f".tmp-{folder.name}-pruned"
        with contextlib.suppress(OSError):  # one checkpoint too many harms nobody
            folder.rename(doomed)
            shutil.rmtree(doomed)


def checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the published checkpoints, newest first, not verified."""
    if not root.is_dir():
        return []
    found = [(m, p) for p in root.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return sorted(((int(m[1]), p) for m, p in found), reverse=True)


def damage(folder: Path) -> str | None:
    """None if the checkpoint is whole (sizes and SHA-256 as in its manifest), else what is not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            return f"{folder / MANIFEST} is not of format {FORMAT} {VERSION}"
        for name, entry in files.items():
            if Path(name).name != name:
                return f"{folder / MANIFEST} names a file outside the folder: {name!r}"
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{folder / name} has {size} bytes, expected {entry['bytes']}"
            digest = _sha256(folder / name)
            if digest != entry["sha256"]:
                return f"{folder / name} has SHA-256 {digest}, expected {entry['sha256']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder} is incomplete ({type(error).__name__}: {error})"
    return None


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `root`, or None; `say` is told why others are skipped.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    found = checkpoints(root)
    for _, folder in found:
        reason = damage(folder)
        if reason is None:
            return folder
        say(f"skipped a damaged checkpoint: {reason}")
    if found:
        raise CheckpointError(f"every checkpoint in {root} is damaged")
    return None


# ---- small files ---------------------------------------------------------------------------


def write_json(path: Path, content: object) -> None:
    """Write JSON text that says NaN nowhere."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")


def replace_json(path: Path, content: object) -> None:
    """write_json, replacing the file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with written(path):
        try:
            write_json(temporary, content)
            _fsync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync(path.parent)


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """A failed write inside is a CheckpointError that names `path`; the system's error does not."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None


def _measure(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    """Make a file's or folder's content durable; some file systems refuse this for folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EPERM, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
