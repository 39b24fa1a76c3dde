"""report.md: the targets, what is wrong, then a table a stage. Made anew after every part.

Of a run that was killed, it is made by: python3 -m benchmarks.gpu.report FOLDER
"""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Results, Row, apart, faults, share
from benchmarks.gpu.targets import COPY, OURS, TIE, targets

DRY = (
    "**A dry run on a CPU, kernels interpreted, sizes tiny. No number here is a measurement; it "
    "shows that every stage runs.**"
)


def write(out: Path) -> None:
    """Replace the report by one of all that is there."""
    results = Results(out)
    sections = [_head(results), _targets(results), _faults(results), _parts(results)]
    sections += [make(results) for make in SECTIONS]
    fresh = out / "report.part"
    fresh.write_text("\n\n".join(s for s in sections if s) + "\n")
    os.replace(fresh, out / "report.md")


def all_ran(out: Path) -> bool:
    """True if every part came to its end and nothing is wrong; a missed speed is not wrong."""
    return not faults(Results(out))


def table(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Markdown; an empty string for no rows."""
    lines = [list(map(_cell, row)) for row in rows]
    heads = list(names)
    marks = ["---"] * len(heads)
    if not lines:
        return ""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, marks, *lines])


def _cell(value: Any) -> str:
    words = "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    return words.replace("|", "\\|").replace("\n", " ")


def _head(results: Results) -> str:
    facts = results.facts("environment")
    packages = facts.get("packages", {})
    versions = ", ".join(f"{n} {v}" for n, v in packages.items() if v)
    name = facts.get("card") or ("no GPU" if results.dry else "GPU not read")
    lines = ["# gptk on a GPU", DRY if results.dry else ""]
    lines.append(f"{name}; {versions}; commit {facts.get('commit')}")
    if "tuning" in facts:
        lines.append(f"Launch configurations: {facts['tuning']}.")
    return "\n\n".join(line for line in lines if line)


def _targets(results: Results) -> str:
    rows = [(t.words, f"**{t.state}**", t.value) for t in targets(results)]
    return "## Targets\n\n" + table(("target", "", "measured"), rows) + f"\n\n{TIE}"


def _faults(results: Results) -> str:
    found = faults(results)
    if not found:
        return ""
    return "## Wrong\n\n" + "\n".join(f"* {_cell(line)}" for line in found)


def _parts(results: Results) -> str:
    rows = [
        (p["stage"], p["part"], p["state"], p["began"], p["seconds"], p["why"])
        for p in results.parts
    ]
    return "## Stages\n\n" + table(("stage", "part", "", "from s", "took s", "why"), rows)


def _environment(results: Results) -> str:
    facts = results.facts("environment")
    rows = [
        (name, value)
        for name, value in facts.items()
        if value is not None and not isinstance(value, dict)
    ]
    rows += [
        (f"{name}: {inner}", value)
        for name, held in facts.items()
        if isinstance(held, dict)
        for inner, value in held.items()
        if value is not None
    ]
    return table(("environment", ""), rows)


def _equivalence(results: Results) -> str:
    """One line a case: the tensor nearest to its bound, or furthest beyond."""
    worst: dict[tuple[str, str, str], Row] = {}
    for row in results.rows("equivalence"):
        key = (row["op"], row["case"], row["dtype"])
        if key not in worst or share(row) > share(worst[key]):
            worst[key] = row
    rows = [
        (*key, r["tensor"], r["error"], r["torchs"], r["bound"], "yes" if r["passed"] else "**no**")
        for key, r in worst.items()
    ]
    heads = ("op", "case", "dtype", "nearest its bound", "error", "PyTorch's", "bound", "passed")
    return table(heads, rows)


def _benchmarks(results: Results) -> str:
    facts = results.facts("environment")
    times: dict[str, dict[tuple[str, ...], float]] = {OURS: {}, COPY: {}}
    for r in results.rows("benchmarks"):
        if "seconds" in r:
            times.setdefault(r["provider"], {})[_key(r)] = r["seconds"]
    heads = ["op", "case", "dtype", "pass", "provider", "ms", "p20 to p80", "n", "rate", "of peak"]
    heads += ["of a copy", "host us", "peak MiB", "of it returned", "gptk / it"]
    rows = []
    for r in results.rows("benchmarks"):
        of = [r.get(name) for name in ("op", "case", "dtype", "mode", "provider")]
        if "refused" in r:
            rows.append([*of, r["refused"], *[None] * (len(heads) - len(of) - 1)])
        else:
            rows.append([*of, *_speed(r, facts, times[OURS], times[COPY])])
    left = [
        f"Left out of {file['part']} for time: {', '.join(file['facts']['left_out_for_time'])}."
        for file in results.files("benchmarks")
        if "left_out_for_time" in file["facts"]
    ]
    return "\n\n".join(filter(None, [table(heads, rows), *left]))


def _speed(
    r: Row, facts: Row, ours: dict[tuple[str, ...], float], copies: dict[tuple[str, ...], float]
) -> list[Any]:
    """of peak: of the copy of 1 GiB, or of the product; of a copy: of one of the case's bytes."""
    moves = "bytes" in r
    roof = facts.get("copy_bandwidth") if moves else facts.get("product_rates", {}).get(r["dtype"])
    rate = r["bytes" if moves else "flops"] / r["seconds"]
    base, copy = ours.get(_key(r)), copies.get(_key(r))
    return [
        f"{1e3 * r['seconds']:.4g}",
        f"{1e3 * r['p20']:.4g} to {1e3 * r['p80']:.4g}",
        r["n"],
        f"{rate / 1e9:.4g} GB/s" if moves else f"{rate / 1e12:.4g} TFLOP/s",
        f"{rate / roof:.0%}" if roof else None,
        f"{copy / r['seconds']:.0%}" if copy else None,
        f"{1e6 * r['host_seconds']:.0f}",
        _mebibytes(r["peak_bytes"]),
        _mebibytes(r["returned_bytes"]),
        f"{base / r['seconds']:.2f}" if base else None,
    ]


def _key(row: Row) -> tuple[str, ...]:
    return row["op"], row["case"], row["dtype"], row.get("mode", "")


def _mebibytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**20:.0f}"


def _training(results: Results) -> str:
    made = []
    for r in results.rows("training"):
        theirs = results.training("torch", r["dtype"])
        made.append(
            (
                r["provider"],
                r["dtype"],
                f"{r['batch']} x {r['context']}",
                f"{len(r['losses'])} of {r['steps']}",
                f"{1e3 * r['seconds']:.4g}",
                f"{r['tokens_per_second']:.0f}",
                _mebibytes(r["peak_bytes"]),
                f"{r['losses'][0]:.4f}",
                f"{r['losses'][-1]:.4f}",
                max(apart(r["losses"], theirs["losses"])) if theirs else None,
            )
        )
    heads = ("GPT-2 124M", "dtype", "batch", "steps", "ms a step", "tokens/s", "peak MiB")
    return table((*heads, "first loss", "last loss", "furthest from torch's"), made)


def _suite(results: Results) -> str:
    rows = []
    for file in results.files("suite"):
        counts = {name: 0 for name in ("passed", "failed", "skipped")}
        for row in file["rows"]:
            counts[row["outcome"]] += 1
        rows.append((file["part"], file["facts"].get("collected"), *counts.values()))
    return table(("tests marked gpu", "collected", "passed", "failed", "skipped"), rows)


def _repeats(results: Results) -> str:
    rows = [
        (r["op"], r["case"], r["dtype"], r["times"], r["different"])
        for r in results.rows("repeats")
    ]
    return table(("repeats", "case", "dtype", "calls", "with other bits"), rows)


def _sanitizer(results: Results) -> str:
    rows = [(r["tool"], r["op"], r["faults"], r["why"][-200:]) for r in results.rows("sanitizer")]
    notes = [
        f"{file['part']}: {name} {words}."
        for file in results.files("sanitizer")
        for name, words in file["facts"].items()
    ]
    return "\n\n".join(filter(None, [table(("tool", "op", "faults", ""), rows), *notes]))


def _extension(results: Results) -> str:
    rows = [("built" if r["built"] else "not built", r["why"]) for r in results.rows("extension")]
    return table(("C++ extension (no GPU kernel is in it)", ""), rows)


def _titled(title: str, make: Callable[[Results], str]) -> Callable[[Results], str]:
    def section(results: Results) -> str:
        body = make(results)
        mark = " (dry run: no measurement)" if results.dry else ""
        return f"## {title}{mark}\n\n{body}" if body else ""

    return section


SECTIONS = (
    _titled("Benchmarks", _benchmarks),
    _titled("Training", _training),
    _titled("Equivalence at GPT-2's sizes", _equivalence),
    _titled("Tests", _suite),
    _titled("Repeats", _repeats),
    _titled("Sanitizer", _sanitizer),
    _titled("Environment", _environment),
    _titled("Extension", _extension),
)

if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "run.json").exists():
        sys.exit("name a run's folder (with run.json): python3 -m benchmarks.gpu.report FOLDER")
    write(Path(sys.argv[1]))
    print((Path(sys.argv[1]) / "report.md").read_text(), end="")
