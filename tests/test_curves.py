"""Curves of cost are true: right answers only, exact exponents, no setting left behind."""

import json
import math

import pytest
import torch

from gptk.bench import curves, curves_report, gate, measure, models
from gptk.bench.main import main
from gptk.bench.providers import PYTORCH, TORCH
from gptk.flags import UsageError

TITLE = {"title": "t", "axis": "T", "time_power": 2, "memory_power": 1}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(measure, "LEAST_RUNS", 2)
    monkeypatch.setattr(curves, "HEADS", 2)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    short = curves.CURVES["attention"]._replace(sizes=(33, 65))
    monkeypatch.setitem(curves.CURVES, "attention", short)


def rows(provider, costs):
    """Rows of the curve "c" from {size: seconds}; memory is ten times that, in bytes."""
    row = {"curve": "c", "dtype": "float32", "provider": provider, "p20": 1.0, "p80": 2.0, "n": 3}
    row["error_ratio"] = None
    return [
        {**row, "size": size, "median": cost, "peak_bytes": 10 * cost}
        for size, cost in costs.items()
    ]


def stored(*members):
    found = {"facts": measure.facts("cpu"), "curves": {"c": TITLE}, "wrong": [], "left_out": []}
    return {**found, "rows": [row for one in members for row in one]}


def test_the_exponent_is_that_of_the_last_two_sizes():
    given = stored(rows("a", {8: 640.0, 2: 7.0, 4: 80.0}), rows("b", {2: 1.0, 8: 2.0}))
    a, b = curves_report.growth(given)
    assert (a["provider"], a["sizes"]) == ("a", "T 4 to 8")
    assert a["time"] == pytest.approx(3.0)
    assert a["memory"] == pytest.approx(3.0)
    assert (a["own_time"], a["own_memory"]) == (2, 1)
    assert b["time"] == pytest.approx(0.5)


def test_growth_beyond_the_op_is_red_and_one_size_has_none():
    steep, right = (curves_report.growth(stored(rows("a", {1: 1.0, 10: c})))[0] for c in (300, 100))
    assert curves_report._powers(steep, "time") == ("[red]T^2.48[/red]", "T^2")
    assert curves_report._powers(right, "time") == ("T^2.00", "T^2")
    assert math.isnan(curves_report.growth(stored(rows("a", {4: 1.0})))[0]["time"])


def test_a_slower_provider_is_red():
    (row,) = rows("gptk cpp", {4: 3.0})
    assert curves_report.cells(row, 2.0)[-1] == "[red]1.50x[/red]"
    assert curves_report.cells(row, 3.0)[-1] == "1.00x"


def test_curves_are_measured_stored_shown_and_drawn(tmp_path, capsys):
    file, folder = tmp_path / "new" / "c.json", tmp_path / "p"
    assert main(["curves", "--case=attention", f"--json={file}", f"--plot={folder}"]) == 0
    first = capsys.readouterr().out

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(file.read_text(), parse_constant=refuse)
    assert found["facts"]["threads"] == torch.get_num_threads()
    names = [PYTORCH, *(f"gptk {name}" for name in curves.backends())]
    places = [(r["curve"], r["size"], r["provider"]) for r in found["rows"]]
    assert places == [("attention", size, name) for size in (33, 65) for name in names]
    assert all(r["median"] > 0 and r["peak_bytes"] > 0 for r in found["rows"])
    assert (folder / "curves.png").stat().st_size > 10_000
    assert main(["curves", f"--show={file}"]) == 0
    again = capsys.readouterr().out
    assert "T 33 to 65" in again
    assert again.splitlines()[0] == first.splitlines()[0]


def test_the_vocabulary_grows():
    found = [curves.measured("linear_cross_entropy", V, "bfloat16").rows[0] for V in (64, 1024)]
    assert [(row["size"], row["provider"], row["dtype"]) for row in found] == [
        (64, PYTORCH, "bfloat16"),
        (1024, PYTORCH, "bfloat16"),
    ]
    assert found[1]["peak_bytes"] > 4 * found[0]["peak_bytes"]


def test_whole_steps_are_judged_and_leave_no_size_behind():
    before = dict(models.SIZES)
    found = curves.measured("step", 64, "float32")
    assert models.SIZES == before
    names = [PYTORCH, *(f"gptk {name}" for name in curves.backends())]
    assert [row["provider"] for row in found.rows] == names
    with pytest.raises(RuntimeError), curves._named(models.SIZES["nano"]):
        raise RuntimeError
    assert models.SIZES == before


def test_a_wrong_answer_is_not_timed(monkeypatch, capsys):
    def with_a_wrong_one(op, device, dtype, backends):
        return {PYTORCH: TORCH[op], "gptk wrong": lambda **v: 2 * TORCH[op](**v)}

    monkeypatch.setattr(curves, "providers", with_a_wrong_one)
    found = curves.measured("attention", 33, "float32")
    assert [row["provider"] for row in found.rows] == [PYTORCH]
    assert "gptk wrong" in found.wrong[0]
    assert main(["curves", "--case=attention"]) == 1
    assert "gptk wrong" in capsys.readouterr().out


def test_a_wrong_step_is_not_timed(monkeypatch):
    def fail(found):
        return {
            name: gate.Verdict(name == "PyTorch fp32", 9.0) for name in found if name != "float64"
        }

    monkeypatch.setattr(models, "verdicts", fail)
    monkeypatch.setattr(curves, "backends", lambda: ["torch"])
    found = curves.measured("step", 64, "float32")
    assert [row["provider"] for row in found.rows] == [PYTORCH]
    assert "gptk torch" in found.wrong[0]


def test_a_size_beyond_the_limit_is_left_out_and_said(monkeypatch, capsys):
    monkeypatch.setattr(curves, "LIMIT_SECONDS", 0.0)
    assert main(["curves", "--case=attention"]) == 0
    assert "attention, T 65: would take" in capsys.readouterr().out
    assert curves.measured("attention", 33, "float32").rows == []


def test_threads_are_what_the_curve_says_and_then_what_they_were(monkeypatch):
    before, seen = torch.get_num_threads(), []

    def prepare(threads, dtype):
        seen.append(torch.get_num_threads())
        raise RuntimeError

    monkeypatch.setitem(
        curves.CURVES, "threads", curves.CURVES["threads"]._replace(prepare=prepare)
    )
    for threads in (before + 1, before + 2):
        with pytest.raises(RuntimeError):
            curves.measured("threads", threads, "float32")
    assert seen == [before + 1, before + 2]
    assert torch.get_num_threads() == before
    assert curves.thread_counts()[0] == 1


def test_long_contexts_are_judged_at_their_length_on_few_heads(monkeypatch):
    monkeypatch.setattr(curves, "HEADS", 12)
    monkeypatch.setattr(curves, "_op", lambda op, dtype, judged, sets: (judged, sets))
    for T, heads in ((64, 12), (2048, 4), (8192, 1)):
        judged, sets = curves._attention(T, torch.bfloat16)
        assert judged["query"].shape == (1, heads, T, 64)
        assert {given["query"].shape for given in sets} == {(1, 12, T, 64)}


def test_no_attention_stores_the_scores(monkeypatch):
    """The reference does, so its memory grows with T^2; a fused one's must not."""
    monkeypatch.setattr(curves, "HEADS", 12)
    monkeypatch.setattr(curves, "JUDGED_SCORES", 2**20)
    monkeypatch.setattr(curves, "_once", lambda call: 0.0)
    monkeypatch.setattr(measure, "interleaved", lambda calls: {name: [1.0] for name in calls})
    names = ["torch", *curves.backends()]
    monkeypatch.setattr(curves, "backends", lambda: names)
    curve = curves.CURVES["attention"]
    found = [row for T in (512, 1024) for row in curves.measured("attention", T, "float32").rows]
    given = {"curves": {"attention": {"axis": curve.axis, "time_power": 2, "memory_power": 1}}}
    power = {
        one["provider"]: one["memory"] for one in curves_report.growth({**given, "rows": found})
    }
    assert power.pop("gptk torch") > 1.4
    assert all(value < 1 + curves_report.STEEPER for value in power.values())


@pytest.mark.parametrize("content", ["", "[]", '{"benchmarks": []}'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(UsageError, match="cannot be read"):
        main(["curves", f"--show={tmp_path / 'f.json'}"])
