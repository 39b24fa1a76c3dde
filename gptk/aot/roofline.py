"""A static roofline of each Triton kernel: what its SASS does against what its op needs.

Counted, for one unit of work (gptk/aot/needs.py: an iteration of the main loop, one iteration of
each sweep over a row, or a program) and all warps of a program, on the heaviest way through: bytes
of global loads and stores, as the threads ask for them; operations of tensor-core instructions by
the shape in their opcode; FP32 and FP64 arithmetic, conversions, MUFU (exponential, reciprocal,
root); accesses of shared memory; all instructions. Lanes that a mask switches off count; an address
that all threads share counts once.

Not counted: what a program does once, where the unit is an iteration; code behind a CALL (slow
paths of division and root); caches, bank conflicts, latency, how well the blocks fill the GPU.
tcgen05 does not name its shape in the opcode: the row of such a kernel says so and holds no counts.
Nor does a bulk copy (TMA) name its size: beside one no bytes are compared.

The bound is the resource that would take longest if each ran alone, at the rates of H100. Memory
time is that of the needed bytes that come from DRAM. `instructions` bounds FP32 arithmetic too:
both go through at 128 lanes per clock. A bound says what a kernel cannot beat, not how fast it is.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptk.aot.findings import OUTLIER
from gptk.aot.needs import NEEDS, SCALARS, Arguments, Need
from gptk.aot.sass import parse
from gptk.aot.work import Work, unit_work
from gptk.flags import UsageError

PER_WARP = ("instructions", "fma", "shared", "shuffles", "bulk")
Row = dict[str, Any]
Stored = dict[str, Any]
ARCH = 90
"""Rows are made for this architecture: H100's."""


class Peak(NamedTuple):
    """Of one multiprocessor in one clock."""

    memory: float  # bytes of DRAM
    tensor: float  # operations, bf16 or fp16 operands, dense
    instructions: int  # of one lane: 4 schedulers x 32
    mufu: int
    fp64: int


H100 = Peak(3.35e12 / (132 * 1.83e9), 989.4e12 / (132 * 1.83e9), 128, 16, 64)
"""3.35 TB/s and 989.4 TFLOP/s on 132 multiprocessors at 1.83 GHz: NVIDIA H100 Tensor Core GPU
Architecture (whitepaper), SXM5. Rates per clock: CUDA C++ Programming Guide, throughput of native
arithmetic instructions, compute capability 9.0."""


def row(case: str, kernel: str, sass: str, warps: int, arguments: Arguments) -> Row:
    """The row of one kernel; of one that cannot be counted, `not_counted` says why."""
    one: Row = {"case": case, "kernel": kernel, "warps": warps}
    if kernel in SCALARS:
        return one | {"not_counted": "works on a few numbers"}
    if kernel not in NEEDS:
        return one | {"not_counted": "gptk/aot/needs.py does not say what it needs"}
    needed = NEEDS[kernel](arguments)
    graph = parse(sass)
    unit, trips = needed.unit, 1
    if needed.trips > 1 and not graph.loops:
        unit, trips = "program", needed.trips
    try:
        work = unit_work(graph, unit, warps, needed.step)
    except ValueError as error:
        return one | {"not_counted": str(error)}
    return one | {"unit": unit} | compared(needed, trips, work, warps)


def compared(needed: Need, trips: int, work: Work, warps: int) -> Row:
    """What was counted against what is needed, and the time that each resource would take."""
    wanted_bytes, wanted = needed.bytes * trips, needed.products * trips
    lanes, elements = 32 * warps, needed.elements * trips
    done = work.products or (2 * lanes * work.counts["fma"] if wanted else 0)
    arithmetic = lanes * (work.counts["fp32"] + work.counts["fma"])
    from_dram = wanted_bytes * needed.dram
    issued = lanes * work.counts["instructions"]
    clocks = {
        "memory": from_dram / H100.memory,
        "tensor": work.products / H100.tensor,
        "instructions": issued / H100.instructions,
        "mufu": lanes * work.counts["mufu"] / H100.mufu,
        "fp64": lanes * work.counts["fp64"] / H100.fp64,
    }
    bound = max(clocks, key=lambda name: clocks[name])
    best = wanted / (H100.tensor if work.products else 2 * H100.instructions)
    moved = work.loaded + work.stored
    return {
        "elements": elements,
        "used": round(needed.used, 3),
        "needed_bytes": wanted_bytes,
        "loaded": work.loaded,
        "stored": work.stored,
        "bytes_ratio": None if work.counts["bulk"] else round(moved / wanted_bytes, 3),
        "needed_products": wanted,
        "products": done,
        "products_ratio": round(done / wanted, 3) if wanted else None,
        "tensor": bool(work.products),
        "per_element": {
            kind: round(lanes * number / elements, 2)
            for kind, number in work.counts.items()
            if kind not in PER_WARP or kind == "instructions"
        },
        "per_warp": {kind: work.counts[kind] for kind in PER_WARP},
        "intensity": round((work.products + arithmetic) / from_dram, 1),
        "clocks": {name: round(value, 1) for name, value in clocks.items()},
        "bound": bound,
        "at_most": round(max(clocks["memory"], best) / clocks[bound], 3),
    }


def read(path: Path) -> Stored:
    """A stored roofline.

    Raises:
        UsageError: it cannot be read as one.
    """
    try:
        stored: Stored = json.loads(path.read_text("utf-8"))
        {key(one): "not_counted" in one or one["bytes_ratio"] for one in stored["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read as a roofline ({error})") from None
    return stored


def write(rows: Sequence[Row], triton: str, path: Path) -> None:
    """Store the rows, one a line."""
    lines = ",\n".join(json.dumps(one) for one in rows)
    path.write_text(f'{{"triton": "{triton}", "arch": {ARCH}, "rows": [\n{lines}\n]}}\n', "utf-8")


def key(one: Row) -> tuple[str, str]:
    return one["case"], one["kernel"]


def losses(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """Where a new row moves, multiplies or executes more than the stored one for what is needed,
    in sentences with both numbers. A row without a stored one is a loss too."""
    held = {key(one): one for one in old}
    said = []
    for one in new:
        place = f"{one['case']}, {one['kernel']}"
        before = held.get(key(one))
        if before is None:
            said.append(f"{place}: not in the stored roofline; store it: make aot")
            continue
        if "not_counted" in one or "not_counted" in before:
            if "not_counted" not in before:
                said.append(f"{place}: was counted, but now {one['not_counted']}")
            continue
        for name in ("bytes", "products"):
            was, now = before[f"{name}_ratio"] or 0.0, one[f"{name}_ratio"] or 0.0
            if now > was + 0.02:
                said.append(f"{place}: {name} {was:.2f} -> {now:.2f} times what is needed")
        was, now = (r["per_element"]["instructions"] for r in (before, one))
        if now > 1.05 * was:
            said.append(f"{place}: instructions for an element {was:.1f} -> {now:.1f}")
    return said


def counted(rows: Sequence[Row]) -> list[Row]:
    """Those that hold counts."""
    return [one for one in rows if "not_counted" not in one]


COLUMNS = ("case", "kernel", "unit", "bytes", "x needed", "products x needed", "lanes used", "fp32",
           "mufu", "instr.", "intensity", "bound", "at most")  # fmt: skip


def cells(one: Row) -> list[str]:
    """A row as text, in the order of COLUMNS; fp32, mufu and instr. are for one element."""
    if "not_counted" in one:
        return [one["case"], one["kernel"], one["not_counted"]]
    each, products = one["per_element"], one["products_ratio"]
    return [
        one["case"],
        one["kernel"],
        one["unit"],
        f"{one['loaded'] + one['stored']:,}",
        "tma" if one["bytes_ratio"] is None else _ratio(one["bytes_ratio"]),
        "-" if products is None else _ratio(products) + ("" if one["tensor"] else " (fp32)"),
        f"{one['used']:.0%}",
        *(f"{each[kind]:.1f}" for kind in ("fp32", "mufu", "instructions")),
        f"{one['intensity']:,.1f}",
        one["bound"],
        f"{one['at_most']:.0%}",
    ]


def _ratio(value: float) -> str:
    return f"[red]{value:.2f}[/red]" if value > OUTLIER else f"{value:.2f}"


def show(rows: Sequence[Row]) -> None:
    """Print the rows, then what is known of the outliers among them."""
    from rich.console import Console
    from rich.table import Table

    from gptk.aot.findings import explained

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(title=f"sm_{ARCH}, bounds of H100", title_justify="left", box=None)
    for column in COLUMNS:
        left = column in ("case", "kernel", "unit", "bound")
        table.add_column(column, justify="left" if left else "right")
    for one in rows:
        table.add_row(*cells(one))
    console.print(table)
    print("at most: the share of the memory's or of the products' peak that the bound leaves")
    for finding, members in explained(counted(rows)).items():
        print(f"{finding.kernel}, {finding.of} ({len(members)} rows): {finding.text}")
