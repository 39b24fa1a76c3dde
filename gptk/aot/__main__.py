"""`python -m gptk.aot`: compile the kernels that ship, say what they need, compare, store."""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from gptk.aot import roofline, summary, table
from gptk.aot.cubin import CHIPS
from gptk.flags import UsageError
from gptk.ops.tuning_file import VARIABLE

STORED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "aot.json"
"""The table of this checkout; the roofline lies beside it."""


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(prog="python -m gptk.aot", description=__doc__)
    made.add_argument("--arch", type=int, action="append", choices=CHIPS)
    made.add_argument(
        "--case", action="append", default=[], help="only cases whose names contain this, or one of"
    )
    made.add_argument("--json", type=Path, help="store the table, its summary, the roofline")
    made.add_argument("--compare", type=Path, help="exit 1 where a kernel needs more than there")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    made.add_argument("--quiet", action="store_true", help="print what is wrong and nothing else")
    made.add_argument(
        "--roofline",
        action="store_true",
        help=f"print, store and compare the roofline (sm_{roofline.ARCH}) instead",
    )
    made.add_argument(
        "--rare", action="store_true", help="compile seldom configurations (rare.py) instead"
    )
    made.add_argument("--stored", action="store_true", help="print what is stored, compile nothing")
    made.add_argument(
        "--summary", action="store_true", help="print each kernel's worst stored case as Markdown"
    )
    return made


def main(argv: list[str]) -> int:
    """Compile, then store, compare and print; returns the exit code."""
    options = parser().parse_args(argv)
    if options.summary:
        print(summary.table(table.read(STORED)), end="")
        return 0
    if options.stored:
        show_stored(options.roofline, options.case, options.arch)
        return 0
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: here kernels compile
    os.environ[VARIABLE] = ""  # what ships, not what the user measured
    from gptk.aot import rare, shipping

    if options.rare and (options.json or options.compare or options.roofline):
        raise UsageError(
            "--rare is neither stored nor compared: leave --json, --compare, --roofline"
        )
    cases = rare.cases() if options.rare else shipping.cases()
    names = [name for name in cases if wanted(name, options.case)]
    if not names:
        raise UsageError(f"no case has {' or '.join(map(repr, options.case))} in its name")
    archs = options.arch or list(table.ARCHITECTURES)
    if options.roofline:
        if options.arch not in (None, [roofline.ARCH]):
            raise UsageError(f"the roofline is that of sm_{roofline.ARCH}: leave --arch out")
        archs = [roofline.ARCH]
    if options.json is not None and not options.json.parent.is_dir():
        raise UsageError(f"no folder {options.json.parent}: make it, or name another for --json")
    old = None if options.compare is None else _read(options.compare, options.roofline, archs)
    with tempfile.TemporaryDirectory(prefix="gptk-aot-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what was compiled before does not count
        rows = compiled(archs, names, options.jobs, options.rare)
    whole = not options.case and set(archs) == set(table.ARCHITECTURES)
    return report(options, rows, old, table.sources() if whole else "a part of the cases")


def wanted(name: str, parts: list[str]) -> bool:
    """Whether a case's name contains one of `parts`; without any, all are wanted."""
    return not parts or any(part in name for part in parts)


Old = tuple[table.Stored | None, roofline.Stored | None]


def _read(path: Path, only_roofline: bool, archs: list[int]) -> Old:
    """The stored table and roofline that are compared with."""
    if only_roofline:
        return None, roofline.read(path)
    beside = path.with_name("roofline.json")
    return table.read(path), roofline.read(beside) if roofline.ARCH in archs else None


def report(
    options: argparse.Namespace, rows: list[table.Row], old: Old | None, sources: str
) -> int:
    """Store, compare and print; returns the exit code."""
    import triton

    roofs = [row.pop("roofline") for row in rows if "roofline" in row]
    stored = {"triton": triton.__version__, "sources": sources, "rows": rows}
    wrong = table.faults(rows)
    for before, new, losses in zip(
        old or (), (rows, roofs), (table.losses, roofline.losses), strict=False
    ):
        if before is not None and before["triton"] == stored["triton"]:
            wrong += losses(before["rows"], new)
        elif before is not None:
            print(
                f"not compared: stored with triton {before['triton']}, this is {stored['triton']}"
            )
    if not options.quiet:
        roofline.show(roofs) if options.roofline else table.show(stored)
    if options.json is not None:
        beside = options.json if options.roofline else options.json.with_name("roofline.json")
        if roofs:
            roofline.write(roofs, triton.__version__, beside)
        if not options.roofline:
            lines = ",\n".join(json.dumps(row) for row in rows)
            head = f'"triton": "{stored["triton"]}", "sources": "{sources}"'
            text = f'{{{head}, "rows": [\n{lines}\n]}}\n'
            options.json.write_text(text, "utf-8")
            options.json.with_suffix(".md").write_text(summary.table(stored), "utf-8")
    for line in wrong:
        print(line)
    print(f"{len(rows)} kernels compiled, {len(wrong)} faults")
    return 1 if wrong else 0


def show_stored(only_roofline: bool, parts: list[str], archs: list[int] | None) -> None:
    """Print the table or the roofline of this checkout."""
    if only_roofline:
        rows = roofline.read(STORED.with_name("roofline.json"))["rows"]
        roofline.show([row for row in rows if wanted(row["case"], parts)])
        return
    found = table.read(STORED)
    kept = [row for row in found["rows"] if wanted(row["case"], parts)]
    table.show(found | {"rows": [row for row in kept if not archs or row["arch"] in archs]})


def compiled(archs: list[int], names: list[str], jobs: int, seldom: bool) -> list[table.Row]:
    """The rows of all architectures, in order, made by `jobs` processes."""
    parts = [(arch, names[i::4]) for arch in archs for i in range(4)]
    parts = [part for part in parts if part[1]]
    made = partial(table.rows, seldom=seldom)
    if jobs == 1:
        found = [made(*part) for part in parts]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            found = list(pool.map(made, *zip(*parts, strict=True)))
    order = {name: place for place, name in enumerate(names)}
    rows = [row for part in found for row in part]
    return sorted(rows, key=lambda row: (row["arch"], order[row["case"]]))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"gptk.aot: {error}", file=sys.stderr)
        sys.exit(2)
