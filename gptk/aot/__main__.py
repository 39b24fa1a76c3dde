"""`python -m gptk.aot`: compile the kernels that ship, say what they need, compare, store."""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from gptk.aot import table
from gptk.flags import UsageError
from gptk.ops.tuning_file import VARIABLE


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(prog="python -m gptk.aot", description=__doc__)
    made.add_argument("--arch", type=int, action="append", choices=table.ARCHITECTURES)
    made.add_argument("--case", default="", help="only cases whose names contain this")
    made.add_argument("--json", type=Path, help="store the table")
    made.add_argument("--compare", type=Path, help="exit 1 where a kernel needs more than there")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    made.add_argument("--quiet", action="store_true", help="print what is wrong and nothing else")
    return made


def main(argv: list[str]) -> int:
    """Compile, then store, compare and print; returns the exit code."""
    options = parser().parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: here kernels compile
    os.environ[VARIABLE] = ""  # what ships, not what the user measured
    import triton

    from gptk.aot.shipping import cases

    names = [name for name in cases() if options.case in name]
    if not names:
        raise UsageError(f"no case has {options.case!r} in its name")
    old = None if options.compare is None else table.read(options.compare)
    archs = options.arch or list(table.ARCHITECTURES)
    with tempfile.TemporaryDirectory(prefix="gptk-aot-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what was compiled before does not count
        rows = compiled(archs, names, options.jobs, options.quiet)
    stored = {"triton": triton.__version__, "rows": rows}
    wrong = table.faults(rows)
    if old is not None and old["triton"] == stored["triton"]:
        wrong += table.losses(old["rows"], rows)
    elif old is not None:
        print(f"not compared: stored with triton {old['triton']}, this is {stored['triton']}")
    if not options.quiet:
        table.show(stored)
    if options.json is not None:
        lines = ",\n".join(json.dumps(row) for row in rows)
        text = f'{{"triton": "{stored["triton"]}", "rows": [\n{lines}\n]}}\n'
        options.json.write_text(text, "utf-8")
    for line in wrong:
        print(line)
    print(f"{len(rows)} kernels compiled, {len(wrong)} faults")
    return 1 if wrong else 0


def compiled(archs: list[int], names: list[str], jobs: int, quiet: bool) -> list[table.Row]:
    """The rows of all architectures, in order, made by `jobs` processes."""
    parts = [(arch, names[i::4]) for arch in archs for i in range(4)]
    parts = [part for part in parts if part[1]]
    if jobs == 1:
        found = [table.rows(*part) for part in parts]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            found = list(pool.map(table.rows, *zip(*parts, strict=True)))
    order = {name: place for place, name in enumerate(names)}
    rows = [row for part in found for row in part]
    return sorted(rows, key=lambda row: (row["arch"], order[row["case"]]))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"gptk.aot: {error}", file=sys.stderr)
        sys.exit(2)
