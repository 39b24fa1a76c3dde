"""What the stages of a run have written, read back; with the standard library alone."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """rows("benchmarks"): of all its parts; facts("environment"); parts: what became of each."""

    def __init__(self, out: Path) -> None:
        run = json.loads((out / "run.json").read_text())
        self.dry: bool = run["dry_run"]
        self.parts: list[Row] = run["parts"]
        self._files = [json.loads(p.read_text()) for p in sorted((out / "stages").glob("*.json"))]

    def rows(self, stage: str) -> list[Row]:
        return [row for file in self._files if file["stage"] == stage for row in file["rows"]]

    def facts(self, stage: str, part: str = "") -> Row:
        for file in self._files:
            if (file["stage"], file["part"]) == (stage, part):
                found: Row = file["facts"]
                return found
        return {}

    def files(self, stage: str) -> list[Row]:
        return [file for file in self._files if file["stage"] == stage]


def faults(results: Results) -> list[str]:
    """What is wrong, one line each: parts that did not end well, answers, bits, memory."""
    found = [
        f"{p['stage']} {p['part']}: {p['state']}, {p['why']}"
        for p in results.parts
        if p["state"] != "done"
    ]
    for row in results.rows("equivalence"):
        if not row["passed"]:
            where = f"{row['op']} {row['case']} {row['dtype']} {row['tensor']}"
            found.append(f"equivalence {where}: {row['error']:.3g}, bound {row['bound']:.3g}")
    for row in results.rows("benchmarks"):
        if row.get("refused") and row["provider"].startswith("gptk"):
            found.append(f"benchmarks {row['op']} {row['case']}: {row['refused']}")
    for row in results.rows("suite"):
        if row["outcome"] == "failed":
            found.append(f"suite {row['test']}: {row['why'].strip().splitlines()[-1]}")
    for row in results.rows("repeats"):
        if row["different"]:
            where = f"{row['op']} {row['case']} {row['dtype']}"
            found.append(f"repeats {where}: {row['different']} of {row['times']} had other bits")
    for row in results.rows("sanitizer"):
        if row["faults"] or (row["faults"] is None and not results.dry):
            found.append(f"{row['tool']} {row['op']}: {row['faults']} faults; {row['why']}")
    return found
