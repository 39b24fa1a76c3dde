"""The time of `make gpu`, and what is left of a run that was cut short."""

import json
import os
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import environment, repeats, stages, suite, training
from benchmarks.gpu.job import Job

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 9
LEFT = 60 * MINUTES - command.RESERVE_SECONDS


def order():
    return [(stage.name, part) for stage in stages.STAGES for part in stage.parts]


def at_worst(length):
    """(stage, part) -> seconds it gets if all before it took as long as they may."""
    latest = stages.latest_ends(stages.STAGES, 0.0, length)
    now, given = 0.0, {}
    for stage in stages.STAGES:
        ends = [min(now + stage.seconds, latest[stage.name, part]) for part in stage.parts]
        if stage.jobs == 1:
            for part in stage.parts:
                given[stage.name, part] = min(stage.seconds, latest[stage.name, part] - now)
                now += given[stage.name, part]
        else:  # a second wave of parts may start when the first has reached its limit
            given |= {(stage.name, p): end - now for p, end in zip(stage.parts, ends, strict=True)}
            now = max(latest[stage.name, part] for part in stage.parts)
    return now, given


def test_the_worst_case_of_the_plan_ends_in_time_with_something_for_every_part():
    now, given = at_worst(LEFT)
    assert now <= LEFT
    kept = {(stage.name, part): stage.kept for stage in stages.STAGES for part in stage.parts}
    assert sum(s.kept * (len(s.parts) if s.jobs == 1 else 1) for s in stages.STAGES) <= LEFT
    assert set(given) == set(kept) == set(order())
    for part, seconds in given.items():
        assert seconds >= kept[part] >= 2 * stages.LEAST_SECONDS, part


def test_a_part_that_needs_no_more_than_planned_has_its_own_limit():
    latest = stages.latest_ends(stages.STAGES, 0.0, LEFT)
    assert latest["benchmarks", "attention"] - 20 - 60 >= 45
    assert list(latest.values()) == sorted(latest.values())
    assert latest["extension", ""] == LEFT


def test_a_shorter_run_keeps_proportionally_less():
    now, given = at_worst(180.0)
    assert now <= 180.0
    assert min(given.values()) > 0
    assert given["training", "torch"] > 10


def test_what_has_a_target_comes_before_what_has_none():
    parts = order()
    untargeted = [("benchmarks", op) for op in ("cross_entropy", "gelu", "mlp", "linear")]
    assert parts[-5:] == [*untargeted, ("extension", "")]
    assert parts.index(("training", "triton")) < parts.index(("training", "compile"))
    assert parts.index(("training", "compile")) < parts.index(("training", "torch"))


HOG = """
import time
from pathlib import Path
from benchmarks.gpu import stages
stages.LEAST_SECONDS = 0.2

if __name__ == "__main__":
    hog = stages.Stage("hog", "hog:hang", 60.0, ("a", "b"), kept=1.0)
    last = stages.Stage("last", "hog:fine", 60.0, kept=2.0)
    run = stages.Run(Path("OUT"), dry=False, ends=time.monotonic() + 4.0)
    stages.run_all(run, (hog, last), preload=())
"""
HANG = "import time\ndef hang(job): time.sleep(60)\ndef fine(job): job.add(value=1)\n"


def environ(folder):
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def test_parts_that_hang_leave_what_is_kept_for_the_last(tmp_path):
    (tmp_path / "hog.py").write_text(HANG)
    (tmp_path / "plan.py").write_text(HOG.replace("OUT", str(tmp_path / "out")))
    subprocess.run(
        [sys.executable, tmp_path / "plan.py"], env=environ(tmp_path), check=True, timeout=60
    )
    parts = json.loads((tmp_path / "out" / "run.json").read_text())["parts"]
    assert [(p["stage"], p["state"]) for p in parts] == [
        ("hog", "stopped"), ("hog", "stopped"), ("last", "done"),
    ]  # fmt: skip
    assert parts[1]["seconds"] >= 0.9


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(exit status, what was printed, folder) of a dry run that SIGTERM ended in its first part."""
    folder = tmp_path_factory.mktemp("ended")
    out = folder / "out"
    arguments = ["-m", "benchmarks.gpu", "--dry-run", "--stage", "training", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environ(folder), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (out / "stages" / "training-triton.json").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said, out


def test_a_run_that_is_ended_says_what_it_cut_off(ended):
    status, said, out = ended
    assert status == 128 + signal.SIGTERM, said
    parts = json.loads((out / "run.json").read_text())["parts"]
    assert {p["part"]: p["state"] for p in parts} == {
        "triton": "stopped", "compile": "not run", "torch": "not run",
    }  # fmt: skip
    assert "* training triton: stopped, the run was ended" in (out / "report.md").read_text()


def test_all_that_was_found_is_in_one_file(ended):
    _, said, out = ended
    assert said.rstrip().endswith(str(out / "all.tar.gz"))
    with tarfile.open(out / "all.tar.gz") as archive:
        names = set(archive.getnames())
    found = {p.relative_to(out.parent).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names == found - {"out/all.tar.gz"}
    assert {"out/report.md", "out/run.json", "out/stages/training-triton.json"} <= names


def remake(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    monkeypatch.delitem(sys.modules, "benchmarks.gpu.report", raising=False)
    runpy.run_module("benchmarks.gpu.report", run_name="__main__")


def test_the_report_of_a_killed_run_is_made_again_with_its_last_rows(tmp_path, monkeypatch, capsys):
    (tmp_path / "stages").mkdir()
    stages.Run(tmp_path, False, 0.0).save()
    row = dict(op="gelu", case="gpt2", dtype="float32", tensor="output 0", passed=True)
    Job("equivalence", "gelu", tmp_path, False, 0.0).add(**row, error=1.0, torchs=1.0, bound=2.0)
    remake(tmp_path, monkeypatch)
    made = (tmp_path / "report.md").read_text()
    assert made == capsys.readouterr().out
    assert "| gelu | gpt2 | float32 | output 0 |" in made
    assert "* equivalence gelu: unfinished, no end of it is recorded" in made
    assert "**met in part**" in made


def test_a_folder_without_a_run_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="name a run's folder"):
        remake(tmp_path, monkeypatch)


def seen_saves(tmp_path, stage, part, column):
    """(job, list that fills with what the last row holds in the column at each save)."""
    (tmp_path / "stages").mkdir()
    job, seen = Job(stage, part, tmp_path, True, time.monotonic() + 60), []
    plain = job.save

    def save(finished=False):
        plain(finished)
        seen.append(json.loads(job.file.read_text())["rows"][-1][column])

    job.save = save
    return job, seen


def test_a_training_saves_its_losses_every_ten_steps(tmp_path):
    job, seen = seen_saves(tmp_path, "training", "torch", "losses")
    words = torch.arange(25 * 9).view(25, 1, 9)
    training._train(job, "float32", lambda batch, _: batch.float().mean(), words)
    assert [len(losses) for losses in seen] == [10, 20, 25]
    assert seen[-1] == [4.0 + 9 * step for step in range(25)]
    assert len(job.rows) == 1
    assert (job.rows[0]["steps"], job.rows[0]["n"]) == (25, 10)


def test_repeats_are_saved_as_they_go(tmp_path, monkeypatch):
    monkeypatch.setattr(repeats, "SAVED_EVERY", 2)
    job, _ = seen_saves(tmp_path, "repeats", "gelu", "times")
    values = iter([0.0, 0.0, -0.0, 0.0, 1.0])
    made = repeats.counts(lambda: [torch.tensor(next(values))], 5, job)
    assert list(made) == [(2, 0), (4, 1), (5, 2)]


def test_the_users_tuning_file_takes_part_only_if_it_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("GPTK_TUNING")
    command.name_tuning_file()
    assert os.environ["GPTK_TUNING"] == ""
    (tmp_path / "mine.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTK_TUNING", "mine.json")
    command.name_tuning_file()
    assert os.environ["GPTK_TUNING"] == str(tmp_path / "mine.json")
    monkeypatch.setenv("GPTK_TUNING", "gone.json")
    with pytest.raises(SystemExit, match=r"gone\.json, which is not there"):
        command.name_tuning_file()


def test_the_suite_takes_the_same_tuning_file_and_the_environment_names_it(tmp_path, monkeypatch):
    (tmp_path / "stages").mkdir()
    job = Job("environment", "", tmp_path, True, 0.0)
    for named, words in {"": "those that ship", "/some/file.json": "/some/file.json"}.items():
        monkeypatch.setenv("GPTK_TUNING", named)
        outcomes = suite.Outcomes(job)
        os.environ["GPTK_TUNING"] = ""  # tests/conftest.py does
        outcomes.pytest_sessionstart()
        assert os.environ["GPTK_TUNING"] == named
        environment.run(job)
        assert job.facts["tuning"] == words
