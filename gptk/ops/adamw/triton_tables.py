"""adamw by Triton, host side: the arrays that tell one launch where all of its tensors are.

They go to the device once per call, as one array from pinned memory, so that the host need not
wait. numpy assembles them: for GPT-2's 148 parameters, lists of Python numbers would take longer
than the update does on the device.
"""

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 2048
"""Elements per program."""

COLUMNS = 9
"""Of a row of the tensor table: first block, elements, parameter's index, its row of random
numbers, then the addresses of gradient, parameter, exp_avg, exp_avg_sq and master."""

Scalar = float | Tensor
Array = np.ndarray[Any, np.dtype[np.int64]]


class Launch(NamedTuple):
    """What one launch runs over: its key, its rows of the table, their number of blocks."""

    key: Any
    table: Array
    blocks: int


def launches(
    keys: Sequence[Hashable],
    numels: Sequence[int],
    tensors: Sequence[Sequence[Tensor | None]],
    rows: Sequence[int] | None = None,
) -> list[Launch]:
    """One launch for each distinct key that has elements; `tensors`, numels and rows by index."""
    table = np.zeros((len(keys), COLUMNS), np.int64)
    table[:, 1] = numels
    table[:, 2] = np.arange(len(keys))
    if rows is not None:
        table[:, 3] = rows
    for column, column_tensors in enumerate(tensors, 4):
        table[:, column] = [0 if t is None else t.data_ptr() for t in column_tensors]
    members: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    found = []
    for key, indices in members.items():
        part = table[indices]
        ends = np.cumsum(-(-part[:, 1] // BLOCK))
        part[1:, 0] = ends[:-1]
        if ends[-1]:
            found.append(Launch(key, part, int(ends[-1])))
    return found


class Scalars:
    """Distinct scalars of a call, as slots of one float64 array."""

    def __init__(self) -> None:
        self.known: dict[Hashable, int] = {}
        self.values: list[float] = []
        self.on_device: list[tuple[int, Tensor]] = []

    def slot(self, value: Scalar) -> int:
        """The slot of a float, or of a 0-dim tensor, which is not read on the host."""
        there = isinstance(value, Tensor) and value.device.type != "cpu"
        number = 0.0 if there else float(value)
        key: Hashable = ("tensor", id(value)) if there else number
        if key not in self.known:
            self.known[key] = len(self.values)
            if isinstance(value, Tensor) and there:
                self.on_device.append((len(self.values), value))
            self.values.append(number)
        return self.known[key]

    def slots(self, values: Sequence[Scalar]) -> list[int]:
        """Of each value; most of them are the same few objects."""
        slot_of = {key: self.slot(x) for key, x in {id(x): x for x in values}.items()}
        return [slot_of[id(x)] for x in values]

    def array(self) -> Array:
        return np.array(self.values, np.float64).view(np.int64)

    def complete(self, sent: Tensor) -> Tensor:
        """The sent array as float64, with what is on the device copied into it there."""
        values = sent.view(torch.float64)
        for slot, value in self.on_device:
            values[slot].copy_(value.detach().reshape(()))
        return values


def send(parts: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Each part, flat, as a part of one int64 tensor on the device."""
    host = torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts]))
    if device.type == "cuda":
        host = host.pin_memory()
    sent = host.to(device, non_blocking=True)
    ends = [0, *np.cumsum([part.size for part in parts]).tolist()]
    return [sent[first:end] for first, end in pairwise(ends)]
