"""Where the time of a training step on a CPU goes: each kernel of the extension, and the rest.

The extension itself times its kernels, from call to return: that is all of their threads' work. The
rest of the step is Python, the autograd engine and PyTorch's operators; torch.profiler lists the
operators.
"""

import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gptk import native

WARM_STEPS = 3
MOST_OPERATORS = 8
"""Rows of PyTorch's operators that are shown."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Part:
    """What one kernel or operator is of a step."""

    name: str
    seconds: float
    calls: float
    flops: float = 0.0  # 0 where they are not counted


@dataclass(frozen=True)
class Breakdown:
    """A step and its parts; what is not a total is per step."""

    steps: int  # measured, each way
    seconds: float  # the median of plain steps
    timed_seconds: float  # with timers around the kernels: what `kernels` and `rest` add up to
    kernels: tuple[Part, ...]  # the longest first
    operators: tuple[Part, ...]  # PyTorch's, in one step under the profiler; the longest first
    profiled_seconds: float  # that step
    allocations: int

    @property
    def rest(self) -> float:
        """Seconds outside of the kernels: Python, the autograd engine, PyTorch's operators."""
        return self.timed_seconds - sum(part.seconds for part in self.kernels)

    @property
    def kernel_calls(self) -> float:
        """Calls of the extension's kernels."""
        return sum(part.calls for part in self.kernels)

    @property
    def operator_calls(self) -> float:
        """Calls of PyTorch's operators, those that operators make included."""
        return sum(part.calls for part in self.operators)

    def share(self, seconds: float) -> float:
        """Of the timed step; the shares of all kernels and of the rest sum to 1."""
        return seconds / self.timed_seconds


def measure(step: Step, steps: int = 10) -> Breakdown:
    """Run `step` 2 * steps + 4 times: to warm up, then in turns plain and with timed kernels, so
    that a slow moment of the machine hits both, and once under the profiler.

    Times of the parts are means over the middle half of the timed steps, by the step's time.

    Args:
        step: one training step on the CPU, its work done when it returns.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps {steps}: must be at least 1")
    for _ in range(WARM_STEPS):
        step()
    plain, timed = [], []
    was_enabled = gc.isenabled()
    gc.disable()  # as in training
    try:
        for _ in range(steps):
            plain.append(_seconds(step))
            with timed_kernels() as tally:
                seconds = _seconds(step)
            timed.append((seconds, tally))
        operators, profiled_seconds, allocations = _profiled(step)
    finally:
        if was_enabled:
            gc.enable()
    timed.sort(key=lambda pair: pair[0])
    kept = timed[steps // 4 : steps - steps // 4]
    totals: Tally = {}
    for _, tally in kept:
        for name, (seconds, calls, flops) in tally.items():
            before = totals.get(name, (0.0, 0, 0.0))
            totals[name] = (before[0] + seconds, before[1] + calls, before[2] + flops)
    n = len(kept)
    return Breakdown(
        steps,
        statistics.median(plain),
        sum(seconds for seconds, _ in kept) / n,
        _longest_first([Part(k, s / n, c / n, f / n) for k, (s, c, f) in totals.items()]),
        operators,
        profiled_seconds,
        allocations,
    )


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def host_seconds(function: Step, calls: int = 20) -> float | None:
    """Of one call on the CPU, what is not inside kernels of the extension: checks, allocations, the
    autograd engine. The median; None where no such kernel runs."""
    samples = []
    for _ in range(calls):
        with timed_kernels() as tally:
            seconds = _seconds(function)
        if not tally:
            return None
        samples.append(seconds - sum(spent for spent, _, _ in tally.values()))
    return statistics.median(samples)


def facts(breakdown: Breakdown) -> dict[str, Any]:
    """The breakdown as JSON: seconds and counts per step."""
    return {
        "seconds": breakdown.timed_seconds,
        "kernels": {part.name: part.seconds for part in breakdown.kernels},
        "rest": breakdown.rest,
        "kernel_calls": breakdown.kernel_calls,
        "operator_calls": breakdown.operator_calls,
        "allocations": breakdown.allocations,
    }


def _longest_first(parts: list[Part]) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=lambda part: -part.seconds))


# ---- kernels -------------------------------------------------------------------------------

Tally = dict[str, tuple[float, int, float]]
"""Kernel -> (seconds, calls, FLOP)."""


@contextlib.contextmanager
def timed_kernels() -> Iterator[Tally]:
    """The tally is filled at the end, with the kernels that were called inside; it stays empty
    without the extension."""
    tally: Tally = {}
    if native.available() is not None:
        yield tally
        return
    extension = native.load()
    extension.count(True)
    try:
        yield tally
    finally:
        extension.count(False)
        tally.update(extension.counted())


# ---- PyTorch's operators -------------------------------------------------------------------


def _profiled(step: Step) -> tuple[tuple[Part, ...], float, int]:
    """(operators by the time spent in themselves, seconds of the step, its allocations)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _no_messages(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        seconds = _seconds(step)
    operators = [
        Part(event.key, event.self_cpu_time_total / 1e6, event.count)
        for event in profile.key_averages()
        if event.key.startswith("aten::")
    ]
    events = profile.profiler.kineto_results.events()
    allocations = sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)
    return _longest_first(operators), seconds, allocations


@contextlib.contextmanager
def _no_messages() -> Iterator[None]:
    """The profiler writes of its own start and of every older block that is freed, in C++."""
    sys.stderr.flush()
    with contextlib.ExitStack() as at_end:
        try:
            kept = os.dup(2)
        except OSError:  # closed
            yield
            return
        at_end.callback(os.close, kept)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        at_end.callback(os.dup2, kept, 2)
        yield


# ---- the table -----------------------------------------------------------------------------


def show(breakdown: Breakdown, peak: float | None = None) -> None:
    """Print the breakdown; `peak` is the FLOP/s that the matrix products' rates are shares of."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=140)
    for title, columns, rows in _tables(breakdown, peak):
        table = Table(box=None, pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(title, style="italic", soft_wrap=True)  # a Table's own is cut to its width
        console.print(table)
        console.print()
    console.print(_summary(breakdown), soft_wrap=True)


def _tables(
    breakdown: Breakdown, peak: float | None
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of each table."""
    if breakdown.kernels:
        rows = [_kernel_row(breakdown, part, peak) for part in breakdown.kernels]
        rest = [_milliseconds(breakdown.rest), f"{breakdown.share(breakdown.rest):.1%}"]
        rows.append(["everything else", *rest, "", "", "", ""])
        columns = ["kernel", "ms", "share", "calls", "GFLOP", "GFLOP/s", "of peak"]
        yield "kernels of the C++ extension, per step", columns, rows
    most, others = breakdown.operators[:MOST_OPERATORS], breakdown.operators[MOST_OPERATORS:]
    rows = [_operator_row(breakdown, part) for part in most]
    if others:
        total = sum(part.seconds for part in others), sum(part.calls for part in others)
        rows.append(_operator_row(breakdown, Part(f"{len(others)} others", *total)))
    title = "PyTorch's operators, in one step under the profiler, which slows them"
    yield title, ["operator", "ms", "share", "calls"], rows


def _kernel_row(breakdown: Breakdown, part: Part, peak: float | None) -> list[str]:
    rate = part.flops / part.seconds if part.seconds else 0.0
    return [
        part.name,
        _milliseconds(part.seconds),
        f"{breakdown.share(part.seconds):.1%}",
        f"{part.calls:g}",
        *([f"{part.flops / 1e9:,.3f}", f"{rate / 1e9:,.1f}"] if part.flops else ["", ""]),
        f"{rate / peak:.0%}" if peak and part.flops else "",
    ]


def _operator_row(breakdown: Breakdown, part: Part) -> list[str]:
    share = part.seconds / breakdown.profiled_seconds
    return [part.name, _milliseconds(part.seconds), f"{share:.1%}", f"{part.calls:g}"]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}"


def _summary(breakdown: Breakdown) -> str:
    """A step in two sentences."""
    counts = (
        f"{breakdown.operator_calls:,.0f} calls of PyTorch's operators, "
        f"{breakdown.allocations:,} allocations"
    )
    if not breakdown.kernels:
        return f"A step calls no kernel of the C++ extension; {counts}."
    return (
        f"A step takes {breakdown.timed_seconds * 1e3:,.2f} ms with the kernels timed "
        f"({breakdown.seconds * 1e3:,.2f} ms plain, the median of {breakdown.steps}), "
        f"{breakdown.rest * 1e3:,.2f} ms of them outside of the kernels: Python, the autograd "
        f"engine and PyTorch's operators. {breakdown.kernel_calls:,.0f} kernel calls, {counts}."
    )
