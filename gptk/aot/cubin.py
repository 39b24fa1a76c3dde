"""What a compiled kernel needs of a GPU, read from its cubin by the tools that Triton brings along.

Registers, stack and shared memory come from `cuobjdump --dump-resource-usage`, instructions from
`nvdisasm`. Occupancy is computed as the CUDA occupancy calculator does: a block takes registers in
units of 256 per warp and shared memory in units of 128 bytes plus 1 KiB that the system keeps.
"""

import collections
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple


class Chip(NamedTuple):
    """One streaming multiprocessor. Source: CUDA C++ Programming Guide 13.0, table of technical
    specifications per compute capability."""

    shared: int  # bytes
    block_shared: int  # bytes that one block may take
    warps: int
    blocks: int
    registers: int = 65536


CHIPS = {
    80: Chip(164 * 1024, 163 * 1024, 64, 32),
    90: Chip(228 * 1024, 227 * 1024, 64, 32),
    100: Chip(228 * 1024, 227 * 1024, 64, 32),
    86: Chip(100 * 1024, 99 * 1024, 48, 16),
    89: Chip(100 * 1024, 99 * 1024, 48, 24),
    120: Chip(100 * 1024, 99 * 1024, 48, 24),
}
"""Compute capability -> its multiprocessor: A100, H100, B200; GeForce RTX 30, 40 and 50."""

TENSOR = {
    "wgmma": re.compile(r"[HIQB]?GMMA\b"),
    "tcgen05": re.compile(r"UTC\w*MMA\b"),
    "mma": re.compile(r"[HID]MMA\b"),
}
"""Kind of tensor-core instruction -> its opcodes in SASS: a warpgroup's, sm_100's, a warp's."""


class Usage(NamedTuple):
    """Of one kernel; `counts` are instructions in the code, not executed ones."""

    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # loads and stores of local memory
    shared: int  # bytes per block
    occupancy: float  # warps that fit, as a share of those that the multiprocessor holds
    counts: dict[str, int]


def tool(name: str) -> str:
    """The path of a CUDA tool: Triton's own.

    Raises:
        FileNotFoundError: this Triton has none.
    """
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"this triton brings no {name} ({path})")
    return str(path)


def read_cubin(cubin: bytes) -> tuple[str, str]:
    """(what cuobjdump says of its resources, its SASS)."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        return _run("cuobjdump", "--dump-resource-usage", path), _run("nvdisasm", "-c", path)


def usage(resources: str, sass: str, arch: int, warps: int, shared: int) -> Usage:
    """What a cubin with one kernel needs; `shared` is what the launch asks for (dynamic)."""
    registers, stack, static = parse_resources(resources)
    counts = count(sass)
    return Usage(
        registers,
        stack,
        counts.pop("local"),
        shared + static,
        occupancy(arch, warps, registers, shared + static),
        counts,
    )


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def parse_resources(text: str) -> tuple[int, int, int]:
    """(registers, stack, static shared memory) from what cuobjdump says of a kernel."""
    found = [re.search(rf"\b{name}:(\d+)", text) for name in ("REG", "STACK", "SHARED")]
    if not all(found):
        raise ValueError(f"cuobjdump names no registers, stack and shared memory: {text!r}")
    registers, stack, static = (int(match[1]) for match in found if match)
    return registers, stack, static


OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)


def count(sass: str) -> dict[str, int]:
    """Instructions of interest in what nvdisasm prints.

    load128, store128: 16 bytes of global memory per thread, cp.async included; load, store:
    narrower ones; tma: bulk copies by descriptor; local: local memory.
    """
    counts = collections.Counter[str]()
    for opcode in OPCODE.findall(sass):
        name, _, suffix = opcode.partition(".")
        counts["instructions"] += 1
        if name in ("LDL", "STL"):
            counts["local"] += 1
        elif name in ("LDG", "LDGSTS", "STG"):
            wide = ".128" in opcode
            counts[("store" if name == "STG" else "load") + ("128" if wide else "")] += 1
        elif name in ("UTMALDG", "UTMASTG"):
            counts["tma"] += 1
        for kind, pattern in TENSOR.items():
            if pattern.fullmatch(name):
                counts[kind] += 1
    names = ("instructions", "local", "load128", "load", "store128", "store", "tma", *TENSOR)
    return {name: counts[name] for name in names}


def occupancy(arch: int, warps: int, registers: int, shared: int) -> float:
    """Share of the multiprocessor's warps that blocks of `warps` warps fill; 0 if none fits."""
    chip = CHIPS[arch]
    if shared > chip.block_shared or not warps:
        return 0.0
    per_warp = -(-registers * 32 // 256) * 256
    per_block = -(-(shared + 1024) // 128) * 128
    blocks = min(
        chip.blocks,
        chip.warps // warps,
        chip.registers // max(1, per_warp * warps),
        chip.shared // per_block,
    )
    return blocks * warps / chip.warps
