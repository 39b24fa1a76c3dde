"""The tables of README.md that say what was measured, made from benchmarks/results/*.json.

Files of `gptk bench --json` and of `gptk bench curves --json`; slower rows are rows like any other.

python docs/results_table.py            puts them between the markers of README.md
python docs/results_table.py --check    exits 1 where README.md says something else
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from gptk.bench import curves_report, report

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- results: python docs/results_table.py -->\n"
END = "<!-- end of results -->\n"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
Row = dict[str, Any]


def number(value: float) -> str:
    """Three significant digits, never with an exponent."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits)}f}"


def ratio(value: float) -> str:
    """Bold where gptk is slower."""
    return f"**{value:.2f}**" if value > 1.005 else f"{value:.2f}"


def mib(row: Row) -> str:
    return f"{number(row['peak_bytes'] / 2**20)} MiB"


def share(row: Row) -> str:
    return f"{row['share']:.0%}" if row["share"] else "-"


def backend(row: Row) -> str:
    """A step's provider names its dtype too: gptk cpp fp32."""
    return row["provider"].split()[1]


def pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """(the fastest of PyTorch's, one of gptk's) for each row of gptk that has a yardstick."""

    def place(row: Row) -> tuple[str, ...]:
        return report.key(row)[:-1]

    theirs: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if not row["provider"].startswith("gptk"):
            best = theirs.setdefault(place(row), row)
            theirs[place(row)] = min(best, row, key=lambda r: r["median"])
    ours = [row for row in rows if row["provider"].startswith("gptk")]
    return [(theirs[place(row)], row) for row in ours if place(row) in theirs]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, or nothing where there are no rows."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" if rows else ""


def steps(rows: list[Row]) -> str:
    head = ["training step", "dtype", "backend", "PyTorch ms", "gptk ms", "gptk / PyTorch"]
    head += ["gptk, of peak", "PyTorch, peak memory", "gptk, peak memory"]
    lines = [
        [
            ours["case"],
            SHORT.get(ours["dtype"], ours["dtype"]),
            backend(ours),
            number(1e3 * theirs["median"]),
            number(1e3 * ours["median"]),
            ratio(ours["median"] / theirs["median"]),
            share(ours),
            mib(theirs),
            mib(ours),
        ]
        for theirs, ours in pairs([r for r in rows if r["op"] == "step"])
    ]
    return markdown(head, lines)


def parts(rows: list[Row]) -> str:
    """Where a step's time goes, a line per step."""
    return "".join(f"* {report.parts_text(row)}\n" for row in rows if row.get("parts"))


def generation(rows: list[Row]) -> str:
    """Tokens per second and share of the roof, a column per provider."""
    kept = [row for row in rows if row["op"] == "generate"]
    providers = list(dict.fromkeys(row["provider"] for row in kept))
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in kept:
        text = f"{number(row['tokens'] / row['median'])} ({share(row)})"
        found.setdefault((row["case"], row["dtype"]), {})[row["provider"]] = text
    lines = [
        [case, SHORT.get(dtype, dtype), *(cells.get(name, "-") for name in providers)]
        for (case, dtype), cells in found.items()
    ]
    return markdown(["generation, tokens/s (of roof)", "dtype", *providers], lines)


def ops(rows: list[Row]) -> str:
    """Forward and backward; of the optimizer, its step."""
    head = ["op, forward + backward", "case", "dtype", "backend", "PyTorch", "gptk"]
    kept = [r for r in rows if r["op"] not in ("step", "generate") and r["mode"] != "forward"]
    lines = [
        [
            f"`{ours['op']}`",
            ours["case"],
            SHORT.get(ours["dtype"], ours["dtype"]),
            backend(ours),
            report.time_text(theirs["median"]),
            report.time_text(ours["median"]),
            ratio(ours["median"] / theirs["median"]),
            share(ours),
            report.time_text(ours["host"]) if ours.get("host") else "-",
        ]
        for theirs, ours in pairs(kept)
    ]
    return markdown([*head, "gptk / PyTorch", "gptk, of roof", "gptk, host"], lines)


def growth(stored: curves_report.Stored) -> str:
    """Of a file of `gptk bench curves`."""
    head = ["curve", "provider", "between", "time", "of the op", "memory", "of the op"]
    lines = []
    for one in curves_report.growth(stored):
        axis = one["sizes"].split()[0]
        line = [one["curve"], one["provider"], one["sizes"]]
        for cost in ("time", "memory"):
            power = "-" if math.isnan(one[cost]) else f"{axis}^{one[cost]:.2f}"
            line += [power, f"{axis}^{one[f'own_{cost}']}"]
        lines.append(line)
    return markdown(head, lines)


def machine(facts: dict[str, Any]) -> str:
    return (
        f"**{facts['device']}**, instruction set {facts['isa']}, threads: {facts['threads']}, "
        f"torch {facts['torch']}"
    )


def section(path: Path) -> str:
    """What one file holds: the machine, how to make it again, its tables."""
    stored = json.loads(path.read_text("utf-8"))
    name = f"benchmarks/results/{path.name}"
    if "benchmarks" in stored:
        facts, command = stored["machine_info"]["gptk"], f"gptk bench --json {name}"
        rows = report.rows_of(path)
        tables = [steps(rows), parts(rows), generation(rows), ops(rows)]
    else:
        facts, command = stored["facts"], f"gptk bench curves --json {name}"
        tables = [growth(stored)]
    head = f"{machine(facts)}; made by `{command}`, then `python docs/results_table.py`.\n"
    return "\n".join([head, *(table for table in tables if table)])


def tables(folder: Path) -> str:
    """All files of a folder, in the order of their names."""
    others = ("aot.json", "roofline.json")
    paths = sorted(path for path in folder.glob("*.json") if path.name not in others)
    if not paths:
        command = "gptk bench --json benchmarks/results/NAME.json"
        return (
            f"No results are stored. `{command}`, then `python docs/results_table.py` adds them.\n"
        )
    return "\n".join(section(path) for path in paths)


def with_tables(readme: str, folder: Path) -> str:
    """The text of README.md with what is between its markers made anew.

    Raises:
        ValueError: there are no markers.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN.strip()} and {END.strip()}")
    return f"{head}{BEGIN}\n{tables(folder)}\n{END}{tail}"


def main(argv: list[str], readme: Path = README, folder: Path = RESULTS) -> int:
    """Rewrite, or with --check compare only; returns the exit code."""
    if argv not in ([], ["--check"]):
        print(__doc__)
        return 2
    old = readme.read_text("utf-8")
    new = with_tables(old, folder)
    if argv:
        if new != old:
            print("README.md is not what the results say; run: python docs/results_table.py")
        return int(new != old)
    readme.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
