"""What the stages of a run have written, read back; with the standard library alone."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

Row = dict[str, Any]
NEAR, LAST = 0.05, 10
"""A model that learns as torch's does: the mean of its last losses is so near to theirs."""


class Results:
    """rows("benchmarks"): of all its parts; facts("environment"); parts: what became of each."""

    def __init__(self, out: Path) -> None:
        run = json.loads((out / "run.json").read_text())
        self.dry: bool = run["dry_run"]
        self._files = [json.loads(p.read_text()) for p in sorted((out / "stages").glob("*.json"))]
        known = {(part["stage"], part["part"]) for part in run["parts"]}
        begun = [f for f in self._files if (f["stage"], f["part"]) not in known]
        self.parts: list[Row] = run["parts"] + [_unfinished(file) for file in begun]

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

    def training(self, provider: str, dtype: str) -> Row | None:
        """The provider's training in this dtype, if it got anywhere."""
        rows = (r for r in self.rows("training") if r["dtype"] == dtype)
        return next((r for r in rows if r["provider"] == provider), None)


def _unfinished(file: Row) -> Row:
    """A part of which no end is recorded: it goes on, or was killed together with the run."""
    why = "no end of it is recorded"
    place = dict(stage=file["stage"], part=file["part"], began=None, seconds=None)
    return dict(**place, state="unfinished", why=why)


def share(row: Row) -> float:
    """An error in units of its bound; infinite for an answer that was not even made."""
    if row["bound"]:
        return float(row["error"]) / float(row["bound"])
    return 0.0 if row["passed"] else math.inf


def apart(losses: list[float], theirs: list[float]) -> list[float]:
    """How far each loss is from theirs, relative; infinite where one is not a number."""
    away = (abs(a - b) / abs(b) for a, b in zip(losses, theirs, strict=False))
    return [d if math.isfinite(d) else math.inf for d in away]


def astray(losses: list[float], theirs: list[float] | None) -> str:
    """Why this is no training to be timed; nothing for one like theirs, as far as both went."""
    bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        return f"the loss of step {bad[0]} is {losses[bad[0]]}"
    steps = min(len(losses), len(theirs or ()))
    if not theirs or not steps or not all(map(math.isfinite, theirs)):
        return ""
    ends = [fmean(each[max(0, steps - LAST) : steps]) for each in (losses, theirs)]
    (away,) = apart(ends[:1], ends[1:])
    return "" if away <= NEAR else f"losses near step {steps - 1} are {away:.0%} from torch's"


def faults(results: Results) -> list[str]:
    """What is wrong, one line each: parts that did not end well, answers, losses, bits, memory."""
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
        if row.get("refused"):
            where = f"{row['op']} {row['case']} {row['provider']}"
            found.append(f"benchmarks {where}: {row['refused']}")
    for row in results.rows("training"):
        theirs = results.training("torch", row["dtype"])
        if why := astray(row["losses"], theirs["losses"] if theirs else None):
            found.append(f"training {row['provider']} {row['dtype']}: {why}")
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
