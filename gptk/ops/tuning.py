"""Launch configurations of Triton kernels: a table that is committed, no timing at run time.

`gptk/ops/<op>/tuning.json` holds, per kernel, rows of arch, bits, size, kinds and config. A call
takes the row with the same `bits` (of the inputs' dtype) and its kind (flags that cost registers),
the largest `arch` (compute capability, 80 for 8.0) that is not above the GPU's, and then the
smallest `size` that is not below its own. The choice is a function of these alone, so the same call
has the same configuration, and gives the same bits, in every process.
"""

import functools
import json
from pathlib import Path
from typing import Any

Config = tuple[int, ...]


@functools.cache
def tuned(op: str, kernel: str, arch: int, bits: int, size: int, kind: str) -> Config:
    """The configuration for a call; arch 0 (the interpreter) takes the lowest there is.

    Raises:
        LookupError: no row has these bits and this kind for a size as large.
    """
    rows = [
        row
        for row in _table(op)[kernel]
        if row["bits"] == bits and kind in row["kinds"] and row["size"] >= size
    ]
    if not rows:
        raise LookupError(f"{op}/tuning.json: no {kernel} for {bits} bits, size {size}, {kind}")
    known = {row["arch"] for row in rows}
    best = max((a for a in known if a <= arch), default=min(known))
    row = min((row for row in rows if row["arch"] == best), key=lambda row: row["size"])
    return tuple(row["config"])


@functools.cache
def _table(op: str) -> dict[str, list[dict[str, Any]]]:
    path = Path(__file__).parent / op / "tuning.json"
    return json.loads(path.read_text("utf-8"))
