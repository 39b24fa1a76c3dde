"""adamw by Triton: the arrays that tell one launch where all of its tensors are.

The host builds them, a program looks up the tensor that its block lies in. They go to the device
once per call, as one array from pinned memory, so that the host need not wait. numpy assembles
them, in half the time that lists of Python numbers take for GPT-2's 148 parameters. They are not
kept for the next call: to see whether they still hold, every address would have to be asked for,
which is what takes the time.
"""

from collections.abc import Hashable, Sequence
from operator import methodcaller
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements per program."""

COLUMNS = 9
"""Of a row of the tensor table: first block, elements, parameter's index, its row of random
numbers, then the addresses of gradient, parameter, exp_avg, exp_avg_sq and master."""

Scalar = float | Tensor
Array = np.ndarray[Any, np.dtype[np.int64]]


def launch_config() -> dict[str, int]:
    """Block and warps of the kernels that run over elements."""
    return {"BLOCK": BLOCK, "num_warps": 8}


@triton.jit
def find_row(table_ptr, block, tensors, halvings, COLUMNS: tl.constexpr):
    """The last row whose first block is <= block, by bisection; empty tensors are never it."""
    low = block * 0  # first block of `low` <= block < first block of `high`
    high = low + tensors
    for _ in range(halvings):
        middle = (low + high) // 2
        before = tl.load(table_ptr + middle * COLUMNS) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return table_ptr + low * COLUMNS


@triton.jit
def aligned(address, DTYPE: tl.constexpr):
    """The address as a pointer that is known to be a multiple of 16, for 128-bit accesses."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


class Launch(NamedTuple):
    """What one launch runs over: its key, its rows of the table, their number of blocks."""

    key: Any
    table: Array
    blocks: int


_data_ptr = methodcaller("data_ptr")


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(_data_ptr, tensors))


def launches(
    keys: Sequence[Hashable],
    numels: Sequence[int],
    pointers: Sequence[Sequence[int]],
    rows: Sequence[int] | None = None,
) -> list[Launch]:
    """One launch for each distinct key that has elements; the lists run over the parameters,
    `pointers` being the lists of the last columns."""
    table = np.zeros((len(keys), COLUMNS), np.int64)
    table[:, 1] = numels
    table[:, 2] = np.arange(len(keys))
    if rows is not None:
        table[:, 3] = rows
    for column, values in enumerate(pointers, 4):
        table[:, column] = values
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
    """Distinct scalars of a call, as slots of one float64 array: first those that the host knows.

    A 0-dim tensor on the device is not read by the host; it is copied there.
    """

    def __init__(self, *lists: Sequence[Scalar]) -> None:
        distinct: dict[int, Scalar] = {}  # few objects, many times
        for values in lists:
            distinct.update(zip(map(id, values), values, strict=True))
        self.on_device = [
            x for x in distinct.values() if isinstance(x, Tensor) and x.device.type != "cpu"
        ]
        there = {id(x): i for i, x in enumerate(self.on_device)}
        numbers = {key: float(x) for key, x in distinct.items() if key not in there}
        self.on_host = list(dict.fromkeys(numbers.values()))
        slot = {number: i for i, number in enumerate(self.on_host)}
        self._slot = {key: slot[number] for key, number in numbers.items()}
        self._slot |= {key: len(self.on_host) + i for key, i in there.items()}

    def slots(self, values: Sequence[Scalar]) -> list[int]:
        """Of each of the very objects that were given."""
        return list(map(self._slot.__getitem__, map(id, values)))

    def array(self) -> Array:
        return np.array(self.on_host, np.float64).view(np.int64)

    def complete(self, sent: Tensor) -> Tensor:
        """All slots on the device, from what was sent of `array`."""
        values = sent.view(torch.float64)
        if self.on_device:
            values = torch.cat([values, *(x.detach().reshape(1).double() for x in self.on_device)])
        return values


def send(parts: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Each part, flat, as a part of one int64 tensor on the device, at a multiple of 16 bytes."""
    starts = [0, *np.cumsum([part.size + part.size % 2 for part in parts]).tolist()]
    flat = np.zeros(starts[-1], np.int64)
    for first, part in zip(starts, parts, strict=False):
        flat[first : first + part.size] = part.reshape(-1)
    host = torch.from_numpy(flat)
    if device.type == "cuda":
        host = host.pin_memory()
    sent = host.to(device, non_blocking=True)
    return [sent[first : first + p.size] for first, p in zip(starts, parts, strict=False)]
