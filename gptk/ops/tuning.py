"""Launch configurations of Triton kernels: tables, no timing at run time.

`gptk/ops/<op>/tuning.json` holds, per kernel, rows of arch, bits, size, kinds and config. A call
takes the row with the same `bits` (of the inputs' dtype) and its kind (flags that cost registers),
the `arch` (compute capability, 80 for 8.0) of the GPU's family, and then the smallest `size` that
is not below its own. Other kernels ship with a function of the sizes.

A row of the user's own file (tuning_file.py, `gptk tune`) for the same bucket of calls wins over
what ships. The choice is a function of arch, dtype, sizes and that file alone, so the same call has
the same configuration, and gives the same bits, in every process.
"""

import contextlib
import functools
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptk.ops import tuning_file
from gptk.ops.tuning_file import Config, Key


def family(arch: int) -> int:
    """The compute capability whose rows are for a GPU: 90 for Hopper, 100 for Blackwell's data
    center GPUs, and 80 for all others, whose tensor cores and shared memory are of that kind."""
    return 90 if arch == 90 else 100 if 100 <= arch < 120 else 80


@functools.cache
def tuned(op: str, kernel: str, arch: int, bits: int, size: int, kind: str) -> Config:
    """The configuration for a call; arch 0 is the interpreter.

    Raises:
        LookupError: no row has these bits and this kind for a size as large.
        TuningFileError: the user's file cannot be used.
    """
    rows = [
        row
        for row in _table(op)[kernel]
        if row["bits"] == bits and kind in row["kinds"] and row["size"] >= size
    ]
    if not rows:
        raise LookupError(f"{op}/tuning.json: no {kernel} for {bits} bits, size {size}, {kind}")
    known = {row["arch"] for row in rows}
    best = max((a for a in known if a <= family(arch)), default=min(known))
    row = min((row for row in rows if row["arch"] == best), key=lambda row: row["size"])
    name = f"{op}.{kernel}"
    own = user_row(name, arch, bits, size, kind) if name in tuning_file.KERNELS else None
    return tuple(row["config"]) if own is None else own


@functools.cache
def user_row(kernel: str, arch: int, bits: int, size: int, kind: str) -> Config | None:
    """The user's configuration for a call, None where the file has none or there is no file.

    Raises:
        TuningFileError: the user's file cannot be used.
    """
    return _user_rows(arch).get((kernel, bits, tuning_file.bucket(kernel, size), kind))


@functools.cache
def _table(op: str) -> dict[str, list[dict[str, Any]]]:
    path = Path(__file__).parent / op / "tuning.json"
    return json.loads(path.read_text("utf-8"))


_trial: Mapping[Key, Config] | None = None


@functools.cache
def _user_rows(arch: int) -> Mapping[Key, Config]:
    if _trial is not None:
        return _trial
    path = tuning_file.in_use(arch)
    if path is None:
        return {}
    content = tuning_file.read(path, arch)
    if arch:  # the interpreter is slow with any configuration
        _warn_of(path, tuning_file.changes(content, arch))
    return tuning_file.rows(content, path)


_warned: set[Path] = set()


def _warn_of(path: Path, changes: Mapping[str, str]) -> None:
    """Say once per process that a file was measured with other things; torch compiles no kernel."""
    words = ", ".join(text for name, text in changes.items() if name != "torch")
    if words and path not in _warned:
        _warned.add(path)
        warnings.warn(
            f"the tuning file {path} was measured on another GPU or with other versions ({words}): "
            f"its configurations may be slow here; {tuning_file.REMEDY}",
            RuntimeWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def trial(rows: Mapping[Key, Config]) -> Iterator[None]:
    """In this block `rows` stand for the user's file, which is not read: {} leaves what ships."""
    global _trial
    before, _trial = _trial, rows
    forget()
    try:
        yield
    finally:
        _trial = before
        forget()


def forget() -> None:
    """The next launch chooses anew."""
    for cached in (tuned, user_row, _user_rows):
        cached.cache_clear()
