"""The table of README.md that says which op runs where and how that was checked.

Where: gptk/ops/catalog.py. How: tests/equivalence.py (which backends and dtypes the tests hold to
the definition), benchmarks/results/aot.json (what was compiled for GPUs), and the stored runs
beside it (what was timed, on what).

python docs/support_table.py            prints it
python docs/support_table.py --write    puts it between the markers of README.md
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptk.ops.catalog import BACKENDS, OPS, ROWS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- support table: python docs/support_table.py --write -->\n"
END = "<!-- end of support table -->\n"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
Row = dict[str, Any]


class Checks(NamedTuple):
    """What is known, as sets of keys."""

    tested: set[tuple[str, str, str]]  # op, backend, dtype
    compiled: dict[tuple[str, str], set[int]]  # op, short dtype -> compute capabilities
    timed: dict[tuple[str, str, str], set[str]]  # op, backend, dtype -> devices


def checks(results: Path = RESULTS) -> Checks:
    """What the tests and the stored results say."""
    compiled: dict[tuple[str, str], set[int]] = {}
    for row in json.loads((results / "aot.json").read_text("utf-8"))["rows"]:
        words = row["case"].split()
        compiled.setdefault((words[0], words[-1]), set()).add(row["arch"])
    timed: dict[tuple[str, str, str], set[str]] = {}
    for device, row in timings(results):
        words = row["provider"].split()
        if words[0] == "gptk" and not row.get("refused"):
            timed.setdefault((row["op"], words[1], row["dtype"]), set()).add(device)
    return Checks(tested(), compiled, timed)


def tested() -> set[tuple[str, str, str]]:
    """Op, backend, dtype that tests/test_equivalence.py compares with the definition."""
    spec = importlib.util.spec_from_file_location("judged", ROOT / "tests" / "equivalence.py")
    assert spec is not None
    assert spec.loader is not None
    judged = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judged)
    names = [str(dtype).removeprefix("torch.") for dtype in judged.DTYPES]
    return {
        (op, kernel, name) for op in judged.CASES for kernel in judged.KERNELS for name in names
    }


def timings(results: Path) -> Iterator[tuple[str, Row]]:
    """(device, row) of the stored runs: files of `gptk bench --json`, folders of `make gpu`."""
    for path in sorted(results.glob("*.json")):
        run = json.loads(path.read_text("utf-8"))
        for one in run.get("benchmarks", ()):
            facts = run["machine_info"]["gptk"]
            if facts["cuda"] or one["extra_info"]["provider"] != "gptk triton":  # interpreted
                yield facts["device"], one["extra_info"]
    for path in sorted(results.glob("gpu*/run.json")):
        if json.loads(path.read_text("utf-8"))["dry_run"]:
            continue
        files = sorted((path.parent / "stages").glob("*.json"))
        stages = [json.loads(file.read_text("utf-8")) for file in files]
        cards = [s["facts"]["card"] for s in stages if "card" in s["facts"]]
        for stage in stages:
            if stage["stage"] == "benchmarks":
                for row in stage["rows"]:
                    yield cards[0], row


def how(op: str, backend: str, dtype: str, known: Checks) -> str:
    """How one implementation was checked in one dtype."""
    if backend == "torch":
        return "the definition"
    found = []
    if (op, backend, dtype) in known.tested:
        found.append("interpreted" if backend == "triton" else "tested")
    archs = known.compiled.get((op, SHORT[dtype]), set()) if backend == "triton" else set()
    if archs:
        found.append("compiled for " + ", ".join(f"sm_{arch}" for arch in sorted(archs)))
    devices = known.timed.get((op, backend, dtype), set())
    if devices:
        found.append(f"timed on {', '.join(sorted(devices))}")
    return ", ".join(found) or "not checked"


def cell(op: str, backend: str, known: Checks) -> str:
    row = ROWS.get((op, backend))
    if row is None:
        return "-"
    groups: dict[str, list[str]] = {}
    for dtype in row.dtypes:
        groups.setdefault(how(op, backend, dtype, known), []).append(SHORT[dtype])
    lines = [f"{', '.join(row.devices) or 'any device'}{' (mm)' if row.vendor else ''}"]
    lines += [f"{' '.join(dtypes)}: {said}" for said, dtypes in groups.items()]
    return "<br>".join(lines)


def on_gpus(known: Checks) -> str:
    """What may be said of the Triton kernels on GPUs."""
    devices = {name for (_, backend, _), names in known.timed.items() if backend == "triton"
               for name in names}  # fmt: skip
    if devices:
        return (
            f"The Triton kernels were timed on {', '.join(sorted(devices))}, where a cell says so."
        )
    return "The Triton kernels are compiled and interpreted; not yet timed on a GPU."


def table(results: Path = RESULTS) -> str:
    known = checks(results)
    lines = [f"| op | {' | '.join(BACKENDS)} |", "|---" * (len(BACKENDS) + 1) + "|"]
    for op in OPS:
        lines.append(f"| `{op}` | {' | '.join(cell(op, name, known) for name in BACKENDS)} |")
    notes = sorted({row.vendor for row in ROWS.values() if row.vendor})
    if notes:
        lines += ["", f"(mm): {'; '.join(notes)}."]
    lines += [
        "",
        "tested, interpreted: compared with the definition by `tests/test_equivalence.py`, on a "
        "CPU, Triton in its interpreter; compiled: for these GPUs without one, by `make aot`; "
        f"timed: the run is in `benchmarks/results/`. {on_gpus(known)}",
    ]
    return "\n".join(lines) + "\n"


def with_table(readme: str, results: Path = RESULTS) -> str:
    """The text of README.md with the table between its markers made anew."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table(results)}\n{END}{tail}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(with_table(README.read_text("utf-8")), "utf-8")
    else:
        print(table(), end="")
