"""The targets of a GPU run, each met, missed or not measured, with the row that decides it."""

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.gpu.results import Results, Row

OURS, EAGER, FLASH = "gptk triton", "torch", "SDPA flash"
BANDWIDTH_SHARE = 0.85
LOSS_RTOL, LOSS_STEPS = 2e-5, 32
TIMES = 250


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
    return Target(words, state, f"{count} of {len(rows)}; worst {abs(value):.3g}{unit} ({where})")


def _pairs(results: Results, op: str, rival: str, mode: str | None = None) -> list[tuple[Row, Row]]:
    """(ours, theirs) of each case and mode (or that mode) that both were timed in."""
    rows = [r for r in results.rows("benchmarks") if r["op"] == op and "seconds" in r]
    ours = {_where(r): r for r in rows if r["provider"] == OURS}
    theirs = [r for r in rows if r["provider"] == rival and mode in (None, r["mode"])]
    return [(ours[_where(r)], r) for r in theirs if _where(r) in ours]


def _where(row: Row) -> str:
    return f"{row['case']} {row['dtype']} {row['mode']}"


def _bandwidth(results: Results) -> list[Target]:
    peak = results.facts("environment").get("copy_bandwidth")
    made = []
    for op in ("layer_norm", "adamw"):
        rows = [
            (row["bytes"] / row["seconds"] / peak, _where(row))
            for row in results.rows("benchmarks")
            if row["op"] == op and row["provider"] == OURS and "seconds" in row and peak
        ]
        found = [(s >= BANDWIDTH_SHARE, -s, where) for s, where in rows]
        words = f"{op}: at least {BANDWIDTH_SHARE:.0%} of the measured copy bandwidth"
        made.append(_target(words, found, " of it", complete(results, "benchmarks", op)))
    return made


def _ratio(pairs: list[tuple[Row, Row]]) -> list[tuple[bool, float, str]]:
    ratios = [(ours["seconds"] / theirs["seconds"], _where(ours)) for ours, theirs in pairs]
    return [(ratio <= 1.0, ratio, where) for ratio, where in ratios]


def _never_slower(results: Results) -> list[Target]:
    return [
        _target(
            f"{op}: never slower than torch from 768 wide up",
            _ratio(_pairs(results, op, EAGER)),
            " of its time",
            complete(results, "benchmarks", op),
        )
        for op in ("layer_norm", "adamw")
    ]


def _attention(results: Results) -> list[Target]:
    return [
        _target(
            f"attention {mode}: at least as fast as torch's flash SDPA, D 64 and 128, T 1k to 8k",
            _ratio(_pairs(results, "attention", FLASH, mode)),
            " of its time",
            complete(results, "benchmarks", "attention"),
        )
        for mode in ("forward", "backward")
    ]


def _linear_cross_entropy(results: Results) -> list[Target]:
    pairs = _pairs(results, "linear_cross_entropy", EAGER, "forward+backward")
    memory = [
        (ours["peak_bytes"] / theirs["peak_bytes"], _where(ours))
        for ours, theirs in pairs
        if ours["peak_bytes"] and theirs["peak_bytes"]
    ]
    whole = complete(results, "benchmarks", "linear_cross_entropy")
    time = "linear_cross_entropy: at most the time of logits and cross_entropy"
    room = "linear_cross_entropy: at most 1/8 of their memory"
    return [
        _target(time, _ratio(pairs), " of it", whole),
        _target(room, [(m <= 1 / 8, m, where) for m, where in memory], " of it", whole),
    ]


def _training(results: Results, provider: str, dtype: str) -> Row | None:
    rows = results.rows("training")
    return next((r for r in rows if (r["provider"], r["dtype"]) == (provider, dtype)), None)


def _step(results: Results) -> Target:
    words = "GPT-2 124M's training step: faster than torch.compile with SDPA"
    ours, theirs = (_training(results, name, "bfloat16") for name in ("triton", "compile"))
    if ours is None or theirs is None:
        return _target(words, [], "")
    ratio = ours["seconds"] / theirs["seconds"]
    return _target(words, [(ratio < 1.0, ratio, "bfloat16 autocast")], " of its time")


def _losses(results: Results) -> Target:
    words = f"losses of {LOSS_STEPS} steps in float32: within {LOSS_RTOL:g} of torch's"
    ours, theirs = (_training(results, name, "float32") for name in ("triton", "torch"))
    if ours is None or theirs is None:
        return _target(words, [], "")
    pairs = zip(ours["losses"][:LOSS_STEPS], theirs["losses"][:LOSS_STEPS], strict=True)
    away = [abs(a - b) / abs(b) for a, b in pairs]
    found = [(d <= LOSS_RTOL, d, f"step {i}") for i, d in enumerate(away)]
    return _target(words, found, "")


def _answers(results: Results) -> Target:
    rows = results.rows("equivalence")
    found = [
        (r["passed"], r["error"] / r["bound"] if r["bound"] else float(not r["passed"]), _case(r))
        for r in rows
    ]
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
