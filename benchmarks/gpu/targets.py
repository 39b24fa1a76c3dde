"""The targets of a GPU run, each met, missed or not measured, with the row that decides it."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from benchmarks.gpu.results import Results, Row, apart, astray, share

OURS, EAGER, FLASH, COPY = "gptk triton", "torch", "SDPA flash", "copy"
BANDWIDTH_SHARE = 0.85
LOSS_RTOL, LOSS_STEPS = 2e-5, 32
TIMES = 250
TIE = "Not slower is also a tie: each median lies within the other's p20 to p80."

Verdict = tuple[bool, float]
"""(met, how bad)"""


class Target(NamedTuple):
    """state: met, met in part (the rest is not measured), missed, or not measured; value: the
    worst of what was measured."""

    words: str
    state: str
    value: str


def targets(results: Results) -> list[Target]:
    """The table; in a dry run nothing counts as measured."""
    made = [
        _answers(results),
        *_bandwidth(results),
        *_never_slower(results),
        *_attention(results),
        *_linear_cross_entropy(results),
        _step(results),
        _losses(results),
        _suite(results),
        _repeats(results),
        *_sanitizer(results),
    ]
    if results.dry:
        return [Target(t.words, "not measured", "a dry run measures nothing") for t in made]
    return made


def complete(results: Results, stage: str, part: str | None = None) -> bool:
    """Did the stage (or one part of it) come to its end, nothing left out for time?"""
    parts = [p for p in results.parts if p["stage"] == stage and part in (None, p["part"])]
    files = [f for f in results.files(stage) if part in (None, f["part"])]
    left_out = any("left_out_for_time" in f["facts"] for f in files)
    return bool(parts) and all(p["state"] == "done" for p in parts) and not left_out


def _target(
    words: str, found: Iterable[tuple[bool, float, str]], unit: str, whole: bool = True
) -> Target:
    """(met, how bad, where) of each measurement; the worst is shown. whole: there are no more."""
    rows = list(found)
    if not rows:
        return Target(words, "not measured", "")
    met, value, where = max(rows, key=lambda row: (not row[0], row[1]))
    count = sum(row[0] for row in rows)
    state = "missed" if count < len(rows) else "met" if whole else "met in part"
    worst = f"{abs(value):.3g}{unit}" if math.isfinite(value) else "no right answer"
    return Target(words, state, f"{count} of {len(rows)}; worst {worst} ({where})")


def _timed(
    results: Results,
    words: str,
    op: str,
    rival: str,
    judge: Callable[[Row, Row], Verdict | None],
    unit: str,
    mode: str | None = None,
) -> Target:
    """Ours judged beside the rival in every case that the benchmarks have to time, or those of one
    mode. A case that ours refused is missed; one without the rival's time leaves a gap."""
    rows = [r for r in results.rows("benchmarks") if r["op"] == op]
    found: list[tuple[bool, float, str]] = []
    gaps = 0
    for case in results.facts("benchmarks", op).get("wanted", ()):
        if mode not in (None, case["mode"]):
            continue
        # a row without a mode is of them all
        its = [r for r in rows if all(r.get(k, v) == v for k, v in case.items())]
        where = " ".join(case.values())
        if any(r["provider"] == OURS and r.get("refused") for r in its):
            found.append((False, math.inf, where))
            continue
        times = {r["provider"]: r for r in its if "seconds" in r}
        verdict = judge(times[OURS], times[rival]) if {OURS, rival} <= set(times) else None
        if verdict is None:
            gaps += 1
        else:
            found.append((*verdict, where))
    return _target(words, found, unit, gaps == 0 and complete(results, "benchmarks", op))


def no_slower(ours: Row, theirs: Row) -> Verdict:
    tie = ours["p20"] <= theirs["seconds"] and ours["seconds"] <= theirs["p80"]
    ratio = ours["seconds"] / theirs["seconds"]
    return ratio <= 1.0 or tie, ratio


def _near_the_copy(ours: Row, copy: Row) -> Verdict:
    reached = copy["seconds"] / ours["seconds"]
    return reached >= BANDWIDTH_SHARE, -reached


def _an_eighth(ours: Row, theirs: Row) -> Verdict | None:
    """Of the memory beyond what is returned; None where it was not counted."""
    if ours["peak_bytes"] is None or theirs["peak_bytes"] is None:
        return None
    mine, their = (r["peak_bytes"] - r["returned_bytes"] for r in (ours, theirs))
    return (8 * mine <= their, mine / their) if their > 0 else None


def _bandwidth(results: Results) -> list[Target]:
    words = f"at least {BANDWIDTH_SHARE:.0%} of the bandwidth of a copy of as many bytes"
    return [
        _timed(results, f"{op}: {words}", op, COPY, _near_the_copy, " of it")
        for op in ("layer_norm", "adamw")
    ]


def _never_slower(results: Results) -> list[Target]:
    words = "never slower than torch from 768 wide up"
    return [
        _timed(results, f"{op}: {words}", op, EAGER, no_slower, " of its time")
        for op in ("layer_norm", "adamw")
    ]


def _attention(results: Results) -> list[Target]:
    words = "not slower than torch's flash SDPA, D 64 and 128, T 1k to 8k"
    return [
        _timed(
            results,
            f"attention {mode}: {words}",
            "attention",
            FLASH,
            no_slower,
            " of its time",
            mode,
        )
        for mode in ("forward", "backward")
    ]


def _linear_cross_entropy(results: Results) -> list[Target]:
    op, mode = "linear_cross_entropy", "forward+backward"
    time = f"{op}: at most the time of logits and cross_entropy"
    room = f"{op}: at most 1/8 of their memory, the gradients that both return left out"
    return [
        _timed(results, time, op, EAGER, no_slower, " of it", mode),
        _timed(results, room, op, EAGER, _an_eighth, " of it", mode),
    ]


def _step(results: Results) -> Target:
    words = "GPT-2 124M's training step: faster than torch.compile with SDPA"
    ours, theirs = (results.training(name, "bfloat16") for name in ("triton", "compile"))
    if ours is None or theirs is None:
        return _target(words, [], "")
    known = results.training("torch", "bfloat16") or theirs
    if why := astray(ours["losses"], known["losses"]):
        return Target(words, "missed", f"it trains wrongly: {why}")
    if why := astray(theirs["losses"], known["losses"]):
        return Target(words, "not measured", f"the compiled one trains wrongly: {why}")
    ratio = ours["seconds"] / theirs["seconds"]
    whole = all(len(row["losses"]) == row["steps"] for row in (ours, theirs))
    return _target(words, [(ratio < 1.0, ratio, "bfloat16 autocast")], " of its time", whole)


def _losses(results: Results) -> Target:
    words = f"losses of {LOSS_STEPS} steps in float32: within {LOSS_RTOL:g} of torch's"
    ours, theirs = (results.training(name, "float32") for name in ("triton", "torch"))
    if ours is None or theirs is None:
        return _target(words, [], "")
    away = apart(ours["losses"], theirs["losses"])[:LOSS_STEPS]
    found = [(d <= LOSS_RTOL, d, f"step {i}") for i, d in enumerate(away)]
    return _target(words, found, "", len(away) == LOSS_STEPS)


def _answers(results: Results) -> Target:
    found = [(r["passed"], share(r), _case(r)) for r in results.rows("equivalence")]
    words = "every op at GPT-2's sizes: within its error bound"
    return _target(words, found, " of its bound", complete(results, "equivalence"))


def _case(row: Row) -> str:
    return f"{row['op']} {row['case']} {row['dtype']} {row['tensor']}"


def _suite(results: Results) -> Target:
    rows = [r for r in results.rows("suite") if r["outcome"] != "skipped"]
    wanted = sum(file["facts"].get("collected", 0) for file in results.files("suite"))
    words = "the tests marked gpu: all pass"
    if not rows:
        return Target(words, "not measured", "")
    passed = sum(r["outcome"] == "passed" for r in rows)
    skipped = len(results.rows("suite")) - len(rows)
    failed = any(r["outcome"] == "failed" for r in rows)
    whole = passed == wanted - skipped and complete(results, "suite")
    state = "missed" if failed else "met" if whole else "met in part"
    return Target(words, state, f"{passed} passed, {skipped} skipped, {wanted} collected")


def _repeats(results: Results) -> Target:
    found = [
        (not r["different"], r["different"], f"{r['op']} {r['case']}")
        for r in results.rows("repeats")
    ]
    all_made = all(r["times"] == TIMES for r in results.rows("repeats"))
    words = f"{TIMES} calls give the same bits"
    return _target(words, found, " calls differ", all_made and complete(results, "repeats"))


def _sanitizer(results: Results) -> list[Target]:
    made = []
    for tool in ("memcheck", "racecheck"):
        words = f"{tool} finds nothing in a sample of the kernels"
        absent = results.facts("sanitizer", tool).get("absent")
        rows = [r for r in results.rows("sanitizer") if r["tool"] == tool]
        known = [(r["faults"] == 0, r["faults"], r["op"]) for r in rows if r["faults"] is not None]
        whole = len(known) == len(rows) and complete(results, "sanitizer", tool)
        if absent:
            made.append(Target(words, "not measured", absent))
        else:
            made.append(_target(words, known, " faults", whole))
    return made
