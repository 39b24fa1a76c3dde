"""`make gpu` without a GPU: its dry run, its imports, stages that crash, hang or come late."""

import functools
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gptk.ops.catalog import OPS

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "triton", "numpy", "pytest")


def closure(names):
    """These distributions and all that they require."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        plain = [r for r in requires if "extra ==" not in r]
        waiting += [
            "".join(c if c.isalnum() or c in "-_." else " " for c in r).split()[0] for r in plain
        ]
    return found


@functools.cache
def others():
    """Modules of every installed package that a GPU machine need not have."""
    allowed = closure(NEEDED)
    return sorted(
        module
        for module, owners in metadata.packages_distributions().items()
        if not {o.lower().replace("_", "-") for o in owners} & allowed and module != "gptk"
    )


def start(arguments, folder):
    """Run Python where only torch, triton, numpy and pytest can be imported."""
    # None in sys.modules is Python's own mark for "not importable"
    hook = f"import sys\nsys.modules.update(dict.fromkeys({others()}))\n"
    (folder / "sitecustomize.py").write_text(hook)
    path = os.pathsep.join([str(folder), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=env, text=True, capture_output=True, check=False, timeout=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """(its process, its folder): one op through every stage."""
    folder = tmp_path_factory.mktemp("gpu")
    arguments = ["-m", "benchmarks.gpu", "--dry-run", "--op", "gelu", "--out", str(folder / "out")]
    return start(arguments, folder), folder / "out"


def test_the_refused_packages_are_really_refused(tmp_path):
    assert {"rich", "tyro", "hypothesis", "matplotlib"} <= set(others())
    assert not {"torch", "triton", "numpy", "pytest", "sympy"} & set(others())
    done = start(["-c", "import rich"], tmp_path)
    assert "import of rich halted" in done.stderr


def test_every_stage_of_a_dry_run_leaves_its_results(dry_run):
    done, out = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    from benchmarks.gpu.stages import STAGES

    files = [json.loads(path.read_text()) for path in (out / "stages").glob("*.json")]
    assert {file["stage"] for file in files} == {stage.name for stage in STAGES} | {"plots"}
    assert all(file["finished"] and file["dry_run"] for file in files)
    assert [f["stage"] for f in files if not f["rows"]] in (
        ["environment", "plots"],
        ["plots", "environment"],
    )
    rows = {file["stage"]: file["rows"] for file in files if file["part"] in ("gelu", "triton")}
    assert all(row["passed"] for row in rows["equivalence"])
    assert {row["provider"] for row in rows["benchmarks"]} == {
        "gptk triton", "torch", "torch.compile", "copy",
    }  # fmt: skip
    assert {row["outcome"] for row in rows["suite"]} == {"passed"}
    assert [row["different"] for row in rows["repeats"]] == [0, 0, 0, 0]


def test_the_report_of_a_dry_run_claims_nothing(dry_run):
    done, out = dry_run
    report = (out / "report.md").read_text()
    assert report in done.stdout
    assert "No number here is a measurement" in report
    targets = report.split("## Targets")[1].split("##")[0]
    rows = [line for line in targets.splitlines() if line.startswith("|")][2:]
    assert targets.count("**not measured**") == len(rows) >= 12
    assert "matplotlib is not installed" in (out / "stages" / "plots.json").read_text()


def test_the_ops_are_those_of_the_catalog():
    from benchmarks.gpu import shapes, stages

    assert sorted(stages.OPS) == sorted(OPS) == sorted(shapes.REAL) == sorted(shapes.TINY)


FAULTY = """
import os, signal, subprocess, time

def crash(job):
    job.add(reached="before the crash")
    os.kill(os.getpid(), signal.SIGSEGV)

def fail(job):
    raise ValueError(f"no {job.part} here")

def hang(job):
    job.note(child=subprocess.Popen(["sleep", "60"]).pid)
    time.sleep(60)

def late(job):
    time.sleep(60)

def fine(job):
    job.add(value=1)
"""
RUN = """
import time
from pathlib import Path
from benchmarks.gpu import stages
stages.LEAST_SECONDS = 0.5

def stage(name, seconds=30.0, parts=("",)):
    return stages.Stage(name, f"faulty:{name}", seconds, parts, jobs=2)

if __name__ == "__main__":
    run = stages.Run(Path("OUT"), dry=False, ends=time.monotonic() + 60)
    table = stage("crash"), stage("fail", parts=("a", "b")), stage("hang", 2.0), stage("fine")
    stages.run_all(run, table, preload=())
    run.ends = time.monotonic() + 1.5
    stages.run_all(run, (stage("late"), stage("never")), preload=())
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """(its process, its folder): stages that go wrong in each way, and one that does not."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "run.py").write_text(RUN.replace("OUT", str(folder / "out")))
    return start([str(folder / "run.py")], folder), folder / "out"


def test_no_stage_ends_the_rest(faulty):
    done, out = faulty
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((out / "run.json").read_text())["parts"]
    found = {f"{p['stage']} {p['part']}".strip(): (p["state"], p["why"]) for p in parts}
    assert found["crash"] == ("crashed", "signal SIGSEGV")
    assert found["fail a"] == ("failed", "exit status 1: ValueError: no a here")
    assert found["fail b"] == ("failed", "exit status 1: ValueError: no b here")
    assert found["hang"] == ("stopped", "it was not done after 2 s")
    assert found["fine"] == ("done", "")
    assert found["late"] == ("stopped", "it was not done after the time of the run")
    assert found["never"] == ("not run", "the time of the run was up")
    report = (out / "report.md").read_text()
    assert all(f"* {stage} : {state}" in report for stage, (state, _) in found.items()
               if stage in ("crash", "hang", "late", "never"))  # fmt: skip


def test_what_was_found_before_a_crash_is_kept(faulty):
    stored = json.loads((faulty[1] / "stages" / "crash.json").read_text())
    assert stored["rows"] == [{"reached": "before the crash"}]
    assert not stored["finished"]


def test_a_stopped_stage_takes_its_processes_with_it(faulty):
    child = json.loads((faulty[1] / "stages" / "hang.json").read_text())["facts"]["child"]
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split(")")[1].split()[0] == "Z"


def test_calls_take_turns_each_behind_a_flushed_cache(monkeypatch):
    from benchmarks.gpu import clock

    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            return 2.0

    class Buffer:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(clock.torch.cuda, "Event", Event)
    monkeypatch.setattr(clock.torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(clock.torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(clock.torch, "empty", lambda *size, **options: Buffer())
    calls = {name: functools.partial(log.append, name) for name in ("ours", "theirs")}
    found = clock.samples(calls, "cuda", seconds=0.0, least=3)
    assert found == {"ours": [2e-3] * 3, "theirs": [2e-3] * 3}
    turn = ["flush", "sleep", "event", "ours", "event", "flush", "sleep", "event", "theirs"]
    assert log[-33:] == ([*turn, "event", "wait"] * 3)
