"""Rows of the ahead-of-time table: made, stored, compared with stored ones, printed."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptk.aot.cubin import TENSOR
from gptk.flags import UsageError

Row = dict[str, Any]
Stored = dict[str, Any]
ARCHITECTURES = (80, 90, 100)
"""Compute capabilities that the table is made for: A100, H100, B200."""


def rows(
    arch: int,
    names: Sequence[str],
    say: Callable[[str], object] = lambda _: None,
    seldom: bool = False,
) -> list[Row]:
    """One row per case and kernel, compiled in this process; `say` is told each case's name. Those
    for roofline.ARCH hold their row of the roofline too. `seldom`: cases of rare.py, whose rows
    hold the spills of the main loop."""
    from gptk.aot import rare, roofline, shipping
    from gptk.aot.compile import compiling

    launches = rare.cases() if seldom else shipping.cases()
    found: dict[tuple[str, str], Row] = {}
    with compiling(arch) as made:
        for name in names:
            say(name)
            made.clear()
            launches[name]()
            for one in made:
                row: Row = {"arch": arch, "case": name, "kernel": one.kernel.lstrip("_")}
                row |= {"warps": one.warps, "stages": one.stages}
                usage = one.usage._asdict()
                row |= usage.pop("counts") | usage | {"seconds": round(one.seconds, 2)}
                if (name, row["kernel"]) not in found:
                    found[name, row["kernel"]] = row
                    if seldom:
                        row["loop_spills"] = rare.spills_in_loop(one.sass) if row["spills"] else 0
                    elif arch == roofline.ARCH:
                        what = (row["kernel"], one.sass, one.warps, one.arguments)
                        row["roofline"] = roofline.row(name, *what)
    return list(found.values())


PACKAGE = Path(__file__).resolve().parents[1]


def sources(package: Path = PACKAGE) -> str:
    """A fingerprint of what a table is made from: the kernels, their launchers and configurations,
    the cases, and how they are counted. Where it is the stored one, so are the rows, by the same
    Triton."""
    patterns = ("ops/**/*triton*.py", "ops/**/tuning*", "aot/*.py")
    paths = sorted({path for pattern in patterns for path in package.glob(pattern)})
    found = hashlib.sha256()
    for path in paths:
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def key(row: Row) -> tuple[int, str, str]:
    return row["arch"], row["case"], row["kernel"]


def read(path: Path) -> Stored:
    """A file of `python -m gptk.aot --json`."""
    try:
        stored = json.loads(path.read_text("utf-8"))
        {key(row): row["spills"] for row in stored["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read as a table of kernels ({error})") from None
    return stored


def faults(found: Sequence[Row]) -> list[str]:
    """What no kernel that ships may have, in sentences; a rare one may spill outside its loop."""
    said = []
    for row in found:
        spills = row.get("loop_spills", row["spills"] or row["stack"])
        if spills:
            what = f"{row['spills']} accesses of local memory, {row['stack']} bytes of stack"
            said.append(f"{place(row)}: {what}")
        if not row["occupancy"]:
            said.append(f"{place(row)}: no block fits ({row['shared']:,} bytes of shared memory)")
    return said


def losses(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """Where a new row is worse than the stored one, in sentences with both numbers.

    A row without a stored one is a loss too: what is not stored is not watched.
    """
    held = {key(row): row for row in old}
    said = []
    for row in new:
        before = held.get(key(row))
        if before is None:
            said.append(f"{place(row)}: not in the stored table; store it: make aot")
            continue
        for kind in TENSOR:
            if before[kind] and not row[kind]:
                said.append(f"{place(row)}: {kind} instructions {before[kind]} -> 0")
        for access in ("load", "store"):
            was, now = wide_share(before, access), wide_share(row, access)
            if now < was - 0.005:
                said.append(
                    f"{place(row)}: {access}s of 128 bits {was:.0%} -> {now:.0%} of the global ones"
                )
        if row["occupancy"] < before["occupancy"]:
            said.append(
                f"{place(row)}: occupancy {before['occupancy']:.0%} -> {row['occupancy']:.0%}"
            )
    return said


def wide_share(row: Row, access: str) -> float:
    """Share of a kernel's global loads (or stores) that move 16 bytes per thread."""
    total = row[f"{access}128"] + row[access]
    return row[f"{access}128"] / total if total else 1.0


def place(row: Row) -> str:
    return f"sm_{row['arch']}, {row['case']}, {row['kernel']}"


COLUMNS = ("case", "kernel", "warps", "stages", "registers", "spills", "shared", "occupancy",
           "tensor cores", "128-bit loads", "stores", "tma", "compile")  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    kinds = [f"{kind} {row[kind]}" for kind in TENSOR if row[kind]]
    return [
        row["case"],
        row["kernel"],
        str(row["warps"]),
        str(row["stages"]),
        str(row["registers"]),
        str(row["spills"]),
        f"{row['shared']:,}",
        f"{row['occupancy']:.0%}",
        ", ".join(kinds) or "-",
        *(f"{row[f'{a}128']}/{row[f'{a}128'] + row[a]}" for a in ("load", "store")),
        str(row["tma"] or "-"),
        f"{row['seconds']:.1f} s",
    ]


def show(stored: Stored) -> None:
    """Print a table for each architecture."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    for arch in dict.fromkeys(row["arch"] for row in stored["rows"]):
        table = Table(title=f"sm_{arch}, triton {stored['triton']}", title_justify="left", box=None)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in ("case", "kernel") else "right")
        for row in stored["rows"]:
            if row["arch"] == arch:
                table.add_row(*cells(row), style="red" if row["spills"] else None)
        console.print(table)
