"""metrics.jsonl: one JSON object per line and step, appended at once.

A kill can tear the last line and leave lines beyond the checkpoint that a resumed run starts
from; reopening drops both, so that the file of a resumed run is that of an uninterrupted one.
"""

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptk.train.checkpoint import written

Record = dict[str, Any]


def read(path: Path, say: Callable[[str], None] = lambda _: None) -> list[Record]:
    """The records of a metrics file. A torn last line is left out, and so is any other that is
    not a JSON object with a step, which `say` is told once: a log is no reason to lose a run."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # what no newline ends is torn, or the empty rest
    records, bad = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, TypeError, KeyError, RecursionError):
            bad.append(number)
        else:
            records.append(record)
    if bad:
        where = f"line {bad[0]}" if len(bad) == 1 else f"{len(bad)} lines from {bad[0]} on"
        say(f"warning: {path}: {where} cannot be read, left out")
    return records


class Metrics:
    """The writer. Fields of the last step join its line (a validation loss comes after a train
    loss), so that there is one line per step."""

    def __init__(self, path: Path, step: int | None = None) -> None:
        """Append to `path`, after dropping the records past `step` (None: all of them)."""
        self.path = path
        kept = [] if step is None else [r for r in read(path, print) if r["step"] <= step]
        *before, self._last = kept or [{}]
        text = b"".join(map(_line, before))
        self._start = len(text)  # of the last record's line
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with written(path):
            try:
                temporary.write_bytes(text + (_line(self._last) if self._last else b""))
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        self._file = path.open("r+b", buffering=0)
        self._file.seek(0, os.SEEK_END)

    def write(self, record: Record) -> None:
        """Write a record, or add its fields to the last one if that has the same step."""
        if self._last.get("step") == record["step"]:
            record = {**self._last, **record}
        else:
            self._start = self._file.seek(0, os.SEEK_END)
        self._file.seek(self._start)
        line = _line(record)
        # one call: a kill does not leave half an old line
        if self._file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._file.truncate()
        self._last = record

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(record: Record) -> bytes:
    """JSON has no NaN and no infinity: they are written as null."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"
