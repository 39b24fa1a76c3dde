"""What the report of `make gpu` makes of its rows: targets met, missed or not measured; faults."""

import json
import math

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.job import Job
from benchmarks.gpu.results import Results, faults, share
from benchmarks.gpu.targets import targets

NAMES = {"layer_norm": "8192x768", "attention": "D64 T1024", "linear_cross_entropy": "a"}
COMPLETE = dict(state="done", why="", began=0.0, seconds=1.0)


def stored(folder, stage, rows, part="", facts=None, state="done"):
    """Adds a part of a stage to the run in the folder, and gives what the run then has."""
    (folder / "stages").mkdir(exist_ok=True)
    job = Job(stage, part, folder, False, 0.0)
    job.rows, job.facts = rows, facts or {}
    job.save(finished=True)
    place = folder / "run.json"
    run = json.loads(place.read_text()) if place.exists() else {"dry_run": False, "parts": []}
    run["parts"] += [{**COMPLETE, "stage": stage, "part": part, "state": state}]
    place.write_text(json.dumps(run))
    return Results(folder)


def found(results, start):
    """(state, value) of the target whose words start so."""
    (one,) = [t for t in targets(results) if t.words.startswith(start)]
    return one.state, one.value


def timed(provider, seconds, op="layer_norm", mode="forward", **columns):
    spread = dict(p20=0.99 * seconds, p80=1.01 * seconds, n=9, host_seconds=0.0)
    row = dict(op=op, case=NAMES[op], dtype="bfloat16", mode=mode, provider=provider)
    memory = dict(peak_bytes=1, returned_bytes=1, bytes=100)
    return row | dict(seconds=seconds) | spread | memory | columns


def refused(provider, op="layer_norm", **columns):
    row = dict(op=op, case=NAMES[op], dtype="bfloat16", provider=provider)
    return row | dict(refused="it does not run") | columns


def benchmarks(folder, *rows, modes=("forward",), others=(), state="done"):
    """A run with these rows of one op, and with what its cases had to be."""
    op = rows[0]["op"]
    cases = [dict(case=NAMES[op], dtype="bfloat16", mode=mode) for mode in modes]
    facts = dict(wanted=[*cases, *others])
    return stored(folder, "benchmarks", list(rows), op, facts, state)


NEVER_SLOWER = "layer_norm: never slower than torch"
SHARE = "layer_norm: at least 85%"


@pytest.mark.parametrize(
    "seconds, state, words",
    [(1.0, "met", "1 of 1"), (1.2, "missed", "0 of 1"), (None, "not measured", "")],
)
def test_a_target_is_met_missed_or_not_measured(seconds, state, words, tmp_path):
    ours = [timed("gptk triton", seconds)] if seconds else []
    results = benchmarks(tmp_path, timed("torch", 1.1), timed("copy", 0.9), *ours)
    assert found(results, NEVER_SLOWER)[0] == found(results, SHARE)[0] == state
    assert found(results, NEVER_SLOWER)[1].startswith(words)
    assert found(results, "adamw: never slower") == ("not measured", "")


def test_a_stopped_part_meets_a_target_in_part_only(tmp_path):
    rows = timed("torch", 1.1), timed("gptk triton", 1.0)
    assert found(benchmarks(tmp_path, *rows, state="stopped"), NEVER_SLOWER)[0] == "met in part"


def test_a_case_without_a_row_leaves_a_gap(tmp_path):
    rows = timed("torch", 1.1), timed("gptk triton", 1.0)
    other = dict(case="8192x1600", dtype="bfloat16", mode="forward")
    assert found(benchmarks(tmp_path, *rows, others=[other]), NEVER_SLOWER)[0] == "met in part"


@pytest.mark.parametrize("columns", [{}, {"mode": "forward"}])
def test_our_own_refusal_misses_the_target(columns, tmp_path):
    rows = timed("torch", 1.1, mode="other"), timed("gptk triton", 1.0, mode="other")
    results = benchmarks(
        tmp_path, refused("gptk triton", **columns), *rows, modes=("forward", "other")
    )
    # where a row names no mode, the answer was wrong and no mode is timed
    count = "1 of 2" if columns else "0 of 2"
    where = "8192x768 bfloat16"
    state, value = found(results, NEVER_SLOWER)
    assert state == "missed"
    assert value.startswith(f"{count}; worst no right answer ({where}")


def test_a_rivals_refusal_is_a_gap_and_a_fault(tmp_path):
    modes = "forward", "backward"
    rows = [timed("gptk triton", 1.0, op="attention", mode=mode) for mode in modes]
    flash = timed("SDPA flash", 1.1, op="attention", mode="forward")
    gone = refused("SDPA flash", op="attention", mode="backward")
    results = benchmarks(tmp_path, *rows, flash, gone, modes=modes)
    assert found(results, "attention forward")[0] == "met"
    assert found(results, "attention backward") == ("not measured", "")
    assert faults(results) == ["benchmarks attention D64 T1024 SDPA flash: it does not run"]


@pytest.mark.parametrize(
    "ours, state", [(1.0, "met"), (1.009, "met"), (1.012, "missed"), (1.2, "missed")]
)
def test_a_tie_within_the_spread_is_not_slower(ours, state, tmp_path):
    results = benchmarks(tmp_path, timed("torch", 1.0), timed("gptk triton", ours))
    assert found(results, NEVER_SLOWER)[0] == state


def test_a_wide_spread_of_ours_alone_is_no_tie(tmp_path):
    rows = timed("torch", 1.0), timed("gptk triton", 1.2, p20=0.5, p80=2.0)
    assert found(benchmarks(tmp_path, *rows), NEVER_SLOWER)[0] == "missed"


def test_bandwidth_is_that_of_a_copy_of_the_cases_own_bytes(tmp_path):
    stored(tmp_path, "environment", [], facts=dict(copy_bandwidth=1e9))
    results = benchmarks(tmp_path, timed("gptk triton", 1.0), timed("copy", 0.9))
    assert found(results, SHARE) == ("met", "1 of 1; worst 0.9 of it (8192x768 bfloat16 forward)")
    report.write(tmp_path)
    heads, _, ours, copy = (
        [cell.strip() for cell in line.split("|")]
        for line in (tmp_path / "report.md").read_text().split("## Benchmarks")[1].splitlines()[2:6]
    )
    both = [heads.index(name) for name in ("of peak", "of a copy")]
    assert [ours[i] for i in both] == ["0%", "90%"]
    assert [copy[i] for i in both] == ["0%", "100%"]


@pytest.mark.parametrize("room, state", [(100, "met"), (101, "missed")])
def test_memory_is_compared_without_the_gradients_that_both_return(room, state, tmp_path):
    op, mode = "linear_cross_entropy", "forward+backward"
    rows = [
        timed(name, 1.0, op, mode, peak_bytes=5000 + more, returned_bytes=5000)
        for name, more in {"gptk triton": room, "torch": 800}.items()
    ]
    results = benchmarks(tmp_path, *rows, modes=(mode,))
    assert found(results, f"{op}: at most 1/8")[0] == state


def trained(provider, dtype="bfloat16", seconds=1.0, losses=None, steps=50):
    learnt = [10.0 / (1 + i) for i in range(50)]
    row = dict(provider=provider, dtype=dtype, seconds=seconds, losses=losses or learnt)
    return row | dict(batch=1, context=8, steps=steps, tokens_per_second=1.0, peak_bytes=None)


def training(folder, *rows):
    for row in rows:
        stored(folder, "training", [row], row["provider"])
    return Results(folder)


STEP = "GPT-2 124M's training step"
LOSSES = "losses of 32 steps"


def test_a_faster_step_that_learns_meets_its_target(tmp_path):
    results = training(
        tmp_path, trained("torch"), trained("triton", seconds=0.9), trained("compile")
    )
    assert found(results, STEP)[0] == "met"
    assert faults(results) == []


@pytest.mark.parametrize(
    "losses, why",
    [([math.nan] * 50, "the loss of step 0 is nan"), ([10.0] * 50, "near step 49")],
)
def test_a_step_that_does_not_learn_as_torchs_is_no_fast_step(losses, why, tmp_path):
    ours = trained("triton", seconds=0.9, losses=losses)
    results = training(tmp_path, trained("torch"), ours, trained("compile"))
    state, value = found(results, STEP)
    assert state == "missed"
    assert why in value
    (fault,) = faults(results)
    assert fault.startswith("training triton bfloat16:")
    assert why in fault


def test_a_compiled_rival_that_diverged_is_no_rival(tmp_path):
    theirs = trained("compile", losses=[math.inf] * 50)
    results = training(tmp_path, trained("torch"), trained("triton", seconds=0.9), theirs)
    assert found(results, STEP)[0] == "not measured"
    assert faults(results) == ["training compile bfloat16: the loss of step 0 is inf"]


def test_a_training_that_was_stopped_counts_as_far_as_it_went(tmp_path):
    for dtype in ("bfloat16", "float32"):
        half = trained("triton", dtype, 0.9)
        half["losses"] = half["losses"][:20]
        folder = tmp_path / dtype
        folder.mkdir()
        results = training(folder, trained("torch", dtype), half, trained("compile", dtype))
        assert found(results, STEP if dtype == "bfloat16" else LOSSES)[0] == "met in part"
        report.write(folder)
        assert "20 of 50" in (folder / "report.md").read_text()


def test_losses_that_are_no_numbers_are_infinitely_far(tmp_path):
    ours = trained("triton", "float32", losses=[9.0, math.nan] + [5.0] * 48)
    results = training(tmp_path, ours, trained("torch", "float32"))
    assert found(results, LOSSES)[1].endswith("worst no right answer (step 1)")


def test_an_op_that_does_not_run_is_the_worst_of_all(tmp_path):
    row = dict(op="gelu", case="gpt2", dtype="float32", torchs=0.0)
    bad = row | dict(tensor="it does not run: x", passed=False, error=math.inf, bound=0.0)
    high = row | dict(tensor="output 0", passed=False, error=1.5, bound=1.0)
    results = stored(tmp_path, "equivalence", [high, bad, high], "gelu")
    assert share(bad) == math.inf
    state, value = found(results, "every op at GPT-2's sizes")
    assert (state, value.split("; ")[1]) == (
        "missed", "worst no right answer (gelu gpt2 float32 it does not run: x)",
    )  # fmt: skip
    report.write(tmp_path)
    assert "| it does not run: x |" in (tmp_path / "report.md").read_text()
