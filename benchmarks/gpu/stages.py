"""The stages in their order, and how they are run so that none can end the rest."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.job import Job, part_file, write_json

OPS = (
    "attention",
    "layer_norm",
    "linear_cross_entropy",
    "cross_entropy",
    "adamw",
    "gelu",
    "mlp",
    "linear",
)
DTYPES = ("float32", "bfloat16", "float16")
PRELOAD = ("torch", "triton")
"""Loaded once, in the process that all parts are forked from; neither touches the GPU by that."""
Key = tuple[str, str]
"""(stage, part)"""
LEAST_SECONDS = 5.0
"""A part that would have less is not started."""


@dataclass(frozen=True)
class Stage:
    """target: module:function, called with a Job; seconds: the limit of each part; jobs: parts
    that run at once (timings need the GPU to themselves); overlaps: its parts need not wait for
    those of the stage before it, if that one has several jobs too.

    kept: seconds of the run that what comes before cannot use up: for the whole stage, or for each
    part where they run one at a time. What is not needed goes to the parts that come first.
    """

    name: str
    target: str
    seconds: float
    parts: tuple[str, ...] = ("",)
    jobs: int = 1
    overlaps: bool = False
    kept: float = 0.0


HERE = "benchmarks.gpu"


def _suite_parts() -> tuple[str, ...]:
    """The attention cases compile for longest, so each dtype has a process of its own."""
    attention = tuple(f"attention/{dtype}" for dtype in (*DTYPES, "float64"))
    return (*attention, *OPS[1:])


def _timings(seconds: float, kept: float, *ops: str) -> Stage:
    return Stage("benchmarks", f"{HERE}.timing:run", seconds, ops, kept=kept)


SANITIZERS = ("memcheck", "racecheck")
STAGES = (
    Stage("environment", f"{HERE}.environment:run", 40, kept=20),
    Stage("equivalence", f"{HERE}.equivalence:run", 75, OPS, jobs=8, kept=60),
    _timings(75, 45, "attention"),
    _timings(45, 20, "layer_norm", "linear_cross_entropy", "adamw"),
    Stage("training", f"{HERE}.training:run", 60, ("triton", "compile", "torch"), kept=35),
    Stage("suite", f"{HERE}.suite:run", 110, _suite_parts(), jobs=8, kept=70),
    Stage("repeats", f"{HERE}.repeats:run", 60, OPS, jobs=8, overlaps=True, kept=25),
    Stage("sanitizer", f"{HERE}.sanitizer:run", 90, SANITIZERS, jobs=8, overlaps=True, kept=35),
    _timings(25, 12, "cross_entropy", "gelu", "mlp", "linear"),
    Stage("extension", f"{HERE}.extension:run", 100, kept=40),
)
"""What has a target comes first; what they keep fits a run of 9 minutes."""


def latest_ends(stages: Sequence[Stage], started: float, ends: float) -> dict[Key, float]:
    """When each part has to be over, so that what is kept for those after it is left. A run that
    is shorter than the plan keeps proportionally less."""
    each = {
        (stage.name, part): stage.kept if stage.jobs == 1 or part == stage.parts[0] else 0.0
        for stage in stages
        for part in stage.parts
    }
    left = sum(each.values())
    scale = min(1.0, (ends - started) / left) if left else 1.0
    found = {}
    for part, kept in each.items():
        left -= kept
        found[part] = ends - scale * left
    return found


@dataclass
class Run:
    """A whole run: where it writes, until when it may last, what became of each part."""

    out: Path
    dry: bool
    ends: float
    started: float = field(default_factory=time.monotonic)
    parts: list[dict[str, Any]] = field(default_factory=list)

    def record(self, stage: str, part: str, state: str, why: str, began: float | None) -> None:
        now = time.monotonic()
        entry = {
            "stage": stage,
            "part": part,
            "state": state,
            "why": why,
            "began": None if began is None else round(began - self.started, 1),
            "seconds": None if began is None else round(now - began, 1),
        }
        self.parts.append(entry)
        name = f"{stage} {part}".strip()
        took = "" if began is None else f" in {now - began:.0f} s"
        print(f"{now - self.started:5.0f} s  {name}: {state}{took}{why and ', ' + why}", flush=True)
        self.save()

    def save(self) -> None:
        write_json(self.out / "run.json", {"dry_run": self.dry, "parts": self.parts})
        report.write(self.out)


@dataclass
class _Running:
    process: BaseProcess
    began: float
    ends: float


def run_all(
    run: Run, stages: tuple[Stage, ...] = STAGES, preload: tuple[str, ...] = PRELOAD
) -> None:
    """Every stage in order; none that crashes, hangs or fails ends the rest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    groups: list[list[Stage]] = []
    for stage in stages:
        if groups and stage.overlaps and min(stage.jobs, groups[-1][-1].jobs) > 1:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    latest = latest_ends(stages, time.monotonic(), run.ends)
    (run.out / "stages").mkdir(parents=True, exist_ok=True)
    run.save()  # from now on a report can be made
    try:
        for group in groups:
            _run_together(run, group, context, latest)
    except BaseException:  # a signal, as a rule: the report names what it cut off
        known = {(entry["stage"], entry["part"]) for entry in run.parts}
        for stage in stages:
            for part in stage.parts:
                if (stage.name, part) not in known:
                    run.record(stage.name, part, "not run", "the run was ended", None)
        raise


def _run_together(run: Run, group: list[Stage], context: Any, latest: dict[Key, float]) -> None:
    waiting = [(stage, part) for stage in group for part in stage.parts]
    running: dict[tuple[Stage, str], _Running] = {}
    jobs = min(group[0].jobs, os.cpu_count() or 1)
    with _killed_on_exit(run, running):
        while waiting or running:
            while waiting and len(running) < jobs:
                stage, part = waiting.pop(0)
                now = time.monotonic()
                ends = min(now + stage.seconds, latest[stage.name, part])
                if ends - now < LEAST_SECONDS:
                    run.record(stage.name, part, "not run", "the time of the run was up", None)
                    continue
                running[stage, part] = _start(run, stage, part, now, ends, context)
            for (stage, part), one in list(running.items()):
                state = _state(one, run.ends)
                if state is not None:
                    del running[stage, part]
                    if state[0] != "done":
                        state = (state[0], state[1] + _last_words(run.out, stage.name, part))
                    run.record(stage.name, part, *state, one.began)
            time.sleep(0.02)


def _start(run: Run, stage: Stage, part: str, now: float, ends: float, context: Any) -> _Running:
    job = Job(stage.name, part, run.out, run.dry, ends)
    process = context.Process(target=_enter, args=(stage.target, job))
    process.start()
    return _Running(process, now, ends)


def _state(one: _Running, run_ends: float) -> tuple[str, str] | None:
    """(state, why) of a part that has ended or had to be; None while it may go on."""
    code = one.process.exitcode
    if code is None and time.monotonic() < one.ends:
        return None
    if code is None:
        _kill(one.process)
        limit = "the time of the run" if one.ends >= run_ends else f"{one.ends - one.began:.0f} s"
        return "stopped", f"it was not done after {limit}"
    _kill(one.process)  # what it started may still be there
    if code == 0:
        return "done", ""
    if code < 0:
        return "crashed", f"signal {signal.Signals(-code).name}"
    return "failed", f"exit status {code}"


def _kill(process: BaseProcess) -> None:
    """The part and every process that it started."""
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except ProcessLookupError:  # it has not made its group yet, or is gone
        process.kill()
    process.join(10)


@contextlib.contextmanager
def _killed_on_exit(run: Run, running: dict[tuple[Stage, str], _Running]) -> Iterator[None]:
    try:
        yield
    finally:
        for one in running.values():
            _kill(one.process)
        for (stage, part), one in running.items():
            run.record(stage.name, part, "stopped", "the run was ended", one.began)


def _last_words(out: Path, stage: str, part: str) -> str:
    """The last line of its log, which for a Python error names it."""
    log = part_file(out, stage, part).with_suffix(".log")
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    words = [line.strip() for line in lines if line.strip()]
    return f": {words[-1][:300]}" if words else ""


def _enter(target: str, job: Job) -> None:
    """In the part's own process: its group, its log, an alarm should the parent be gone."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.alarm(max(1, int(job.left()) + 2))
    log = os.open(job.file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    job.save()
    module, _, function = target.partition(":")
    work: Callable[[Job], None] = getattr(importlib.import_module(module), function)
    work(job)
    job.save(finished=True)
