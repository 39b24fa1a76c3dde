"""adamw by Triton, host side: the arrays that tell one launch where all of its tensors are.

Every array goes to the device once per call, from pinned memory, so that the host need not wait.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2048
"""Elements per program."""

COLUMNS = 8
"""Of a row of the tensor table: first block, elements, parameter's index, then the addresses of
gradient, parameter, exp_avg, exp_avg_sq and master."""

Scalar = float | Tensor


class Group(NamedTuple):
    """Tensors of one launch: rows of the table without their first column, and their blocks."""

    rows: list[list[int]]
    blocks: list[int]

    def add(self, n: int, index: int, tensors: Sequence[Tensor | None]) -> None:
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        self.rows.append([n, index, *addresses, *[0] * (COLUMNS - 3 - len(addresses))])
        self.blocks.append(-(-n // BLOCK))

    def table(self) -> list[int]:
        """The rows, flat, each led by its first block."""
        flat, first = [], 0
        for row, blocks in zip(self.rows, self.blocks, strict=True):
            flat += [first, *row]
            first += blocks
        return flat


def _send(values: list[int] | list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The list on the device; from pinned memory, so that the host need not wait."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class Scalars:
    """Distinct scalars of a call, as slots of one float64 tensor on the device."""

    def __init__(self) -> None:
        self.slots: dict[float | tuple[str, int], int] = {}
        self.values: list[float] = []
        self.on_device: list[tuple[int, Tensor]] = []

    def slot(self, value: Scalar) -> int:
        """The slot of a float, or of a 0-dim tensor, which is not read on the host."""
        key: float | tuple[str, int]
        if isinstance(value, Tensor) and value.device.type != "cpu":
            key, number = ("tensor", id(value)), 0.0
        else:
            key = number = float(value)
        if key not in self.slots:
            self.slots[key] = len(self.values)
            self.values.append(number)
            if isinstance(value, Tensor) and value.device.type != "cpu":
                self.on_device.append((self.slots[key], value))
        return self.slots[key]

    def send(self, device: torch.device) -> Tensor:
        sent = _send(self.values, torch.float64, device)
        for slot, value in self.on_device:
            sent[slot].copy_(value.detach().reshape(()))
        return sent


def send_tables(groups: Sequence[Group], more: list[int], device: torch.device) -> list[Tensor]:
    """The groups' tables and `more`, each a part of one tensor that is sent once."""
    parts = [group.table() for group in groups] + [more]
    sent = _send([value for part in parts for value in part], torch.int64, device)
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    return [sent[first:end] for first, end in pairwise(ends)]
