"""`gptk bench curves`: time and peak memory against T, V, width and threads, gptk and PyTorch.

A size is measured as the suite measures a case: answers are judged first, the providers are timed
in turns, peak memory is counted at the allocator. A size that would take longer than LIMIT_SECONDS
is left out, and a line says so.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptk.bench import curves_report, gate, measure, models, report
from gptk.bench.gate import Verdict
from gptk.bench.providers import providers
from gptk.bench.stored import write
from gptk.model import GPTConfig
from gptk.ops.attention.cases import inputs as attention_inputs
from gptk.ops.contract import availability
from gptk.ops.linear_cross_entropy.cases import inputs as linear_cross_entropy_inputs

LIMIT_SECONDS = 40.0
"""Time given to one size, at most: the whole then ends within six minutes on two cores."""
SETS = 2
"""Sets of inputs that a provider of an op is given in turns."""
HEADS, HEAD_SIZE = 12, 64
JUDGED_SCORES = 2**24
"""Scores that attention's float64 reference may hold. Longer contexts are judged on fewer heads,
which is enough to see a wrong head: no head depends on another."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Prepared(NamedTuple):
    """calls: of the providers whose answers are right; verdicts: of all."""

    calls: dict[str, list[measure.Call]]
    verdicts: dict[str, Verdict]


class Curve(NamedTuple):
    """One size grows, the rest stays.

    time_power, memory_power: the op's own growth, cost ~ size ** power; for threads, what
    dividing the work perfectly would give.
    """

    title: str
    axis: str
    sizes: tuple[int, ...]
    time_power: int
    memory_power: int
    prepare: Callable[[int, torch.dtype], Prepared]


def backends() -> list[str]:
    """cpp, where the extension is built."""
    return ["cpp"] if availability("cpp") is None else []


# ---- what grows -----------------------------------------------------------------------------


def _attention(T: int, dtype: torch.dtype) -> Prepared:
    def values(H: int, seed: int) -> dict[str, Any]:
        return attention_inputs(1, H, T, T, HEAD_SIZE, dtype, causal=True, seed=seed)

    judged = values(max(1, min(HEADS, JUDGED_SCORES // T**2)), 0)
    return _op("attention", dtype, judged, [values(HEADS, seed) for seed in range(SETS)])


def _linear_cross_entropy(V: int, dtype: torch.dtype) -> Prepared:
    sets = [linear_cross_entropy_inputs((512, 384), V, dtype, seed=seed) for seed in range(SETS)]
    return _op("linear_cross_entropy", dtype, sets[0], sets)


def _op(op: str, dtype: torch.dtype, judged: dict[str, Any], sets: list[dict]) -> Prepared:
    functions = providers(op, "cpu", dtype, backends())
    verdicts = {name: gate.judge(op, f, judged, name) for name, f in functions.items()}
    passed = [name for name, verdict in verdicts.items() if verdict.passed]
    return Prepared({n: [_both(op, functions[n], v) for v in sets] for n in passed}, verdicts)


def _both(op: str, function: Callable[..., Any], values: dict[str, Any]) -> measure.Call:
    """Forward and backward of an op with one output."""
    inputs = gate.leaves(op, values)
    given = {**values, **inputs}
    dy = gate.upstream((function(**given),))

    def call() -> None:
        torch.autograd.grad((function(**given),), list(inputs.values()), dy)

    return call


def _width(C: int, dtype: torch.dtype) -> Prepared:
    config = GPTConfig(128, 65, n_layer=2, n_head=C // HEAD_SIZE, n_embd=C)
    return _step(models.Size(config, 8), dtype)


def _threads(threads: int, dtype: torch.dtype) -> Prepared:
    return _step(models.Size(models.SIZES["shakespeare"].config, 2), dtype)


def _step(size: models.Size, dtype: torch.dtype) -> Prepared:
    """Whole training steps: forward, backward, clipping, AdamW."""
    with _named(size) as name:
        found = models.providers(name, [dtype], backends())
    judged = models.verdicts(found)
    calls: dict[str, list[measure.Call]] = {}
    verdicts: dict[str, Verdict] = {}
    for name, verdict in judged.items():
        provider = name.rpartition(" ")[0]  # without the dtype
        verdicts[provider] = verdict
        if verdict.passed:
            found[name].step()  # the optimizer's state, equal for all, does not count
            found[name].forget()
            calls[provider] = [found[name].step]
    return Prepared(calls, verdicts)


@contextlib.contextmanager
def _named(size: models.Size) -> Iterator[str]:
    """A name by which gptk.bench.models knows the size while the block runs."""
    name = "curve"
    models.SIZES[name] = size
    try:
        yield name
    finally:
        del models.SIZES[name]


def thread_counts() -> tuple[int, ...]:
    """1, 2, 4, ... and all cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return tuple(sorted({*(2**i for i in range(cores.bit_length())), cores}))


CURVES = {
    "attention": Curve(
        f"attention, causal, {HEADS} heads of {HEAD_SIZE}, forward + backward",
        "T",
        tuple(2**i for i in range(6, 13)),
        2,
        1,
        _attention,
    ),
    "linear_cross_entropy": Curve(
        "linear_cross_entropy, N 512, C 384, forward + backward",
        "V",
        tuple(4**i for i in range(4, 9)),
        1,
        1,
        _linear_cross_entropy,
    ),
    "step": Curve(
        "training step, 2 layers, T 128, B 8",
        "C",
        (64, 128, 256, 384, 512, 768),
        2,
        2,
        _width,
    ),
    "threads": Curve(
        "training step, 6 layers, C 384, T 256, B 2",
        "threads",
        thread_counts(),
        -1,
        0,
        _threads,
    ),
}


# ---- measuring ------------------------------------------------------------------------------


class Found(NamedTuple):
    """rows: one per provider; wrong, left_out: sentences about what has no row."""

    rows: list[dict[str, Any]]
    wrong: list[str]
    left_out: list[str]


def measured(name: str, size: int, dtype: str) -> Found:
    """One size of a curve; the number of threads is afterwards what it was."""
    threads = torch.get_num_threads()
    try:
        if name == "threads":
            torch.set_num_threads(size)
        return _measured(name, size, dtype)
    finally:
        torch.set_num_threads(threads)


def _measured(name: str, size: int, dtype: str) -> Found:
    calls, verdicts = CURVES[name].prepare(size, DTYPES[dtype])
    place = f"{name}, {CURVES[name].axis} {size:,}"
    wrong = [
        f"{place}: the answer of {provider} is wrong, so it is not timed ({verdict})"
        for provider, verdict in verdicts.items()
        if not verdict.passed
    ]
    if not calls:
        return Found([], wrong, [])
    memory = {provider: measure.peak_memory(sets[0]) for provider, sets in calls.items()}
    once = [min(_once(sets[0]) for _ in range(2)) for sets in calls.values()]
    needed = sum(once) * (measure.LEAST_RUNS + SETS + 1)
    if needed > LIMIT_SECONDS:
        sentence = f"{place}: would take {needed:.0f} s, the limit is {LIMIT_SECONDS:.0f} s"
        return Found([], wrong, [sentence])
    rows = []
    for provider, seconds in measure.interleaved(calls).items():
        median, p20, p80 = measure.quantiles(seconds)
        row = {"curve": name, "size": size, "dtype": dtype, "provider": provider}
        row |= {"median": median, "p20": p20, "p80": p80, "n": len(seconds)}
        ratio = verdicts[provider].ratio
        row |= {"peak_bytes": memory[provider], "error_ratio": None if isnan(ratio) else ratio}
        rows.append(row)
    return Found(rows, wrong, [])


def _once(call: measure.Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---- the command ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The flags of `gptk bench curves`."""
    made = argparse.ArgumentParser(
        prog="gptk bench curves",
        description="How time and peak memory grow with T, V, width and threads, on this CPU.",
    )
    made.add_argument("--case", action="append", choices=tuple(CURVES), help="default: all")
    made.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    made.add_argument("--json", type=Path, help="store the rows")
    made.add_argument("--plot", type=Path, help="folder for curves.png")
    made.add_argument("--show", type=Path, help="print a stored file and measure nothing")
    return made


def main(argv: list[str]) -> int:
    """Measure, store, print, draw; returns the exit code, 1 if an answer was wrong."""
    options = parser().parse_args(argv)
    if options.show is not None:
        stored = curves_report.read(options.show)
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each count of memory says two lines
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
        stored = run(options.case or list(CURVES), options.dtype)
        if options.json is not None:
            write(stored, "rows", options.json)
    curves_report.show(stored)
    if options.plot is not None and stored["rows"]:
        print(f"drawn: {curves_report.plot(stored, options.plot)}")
    return 1 if stored["wrong"] else 0


def run(names: list[str], dtype: str) -> dict[str, Any]:
    """What is stored: facts of the machine, what grows, rows, and what has no row."""
    curves: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    left_out: list[str] = [] if backends() else [f"gptk: {availability('cpp')}"]
    stored: dict[str, Any] = {"facts": measure.facts("cpu"), "curves": curves, "wrong": wrong}
    stored |= {"left_out": left_out, "rows": rows}
    for name in dict.fromkeys(names):
        curve = CURVES[name]
        curves[name] = {"title": curve.title, "axis": curve.axis}
        curves[name] |= {"time_power": curve.time_power, "memory_power": curve.memory_power}
        for size in curve.sizes:
            found = measured(name, size, dtype)
            rows += found.rows
            wrong += found.wrong
            left_out += found.left_out
            line = [f"{r['provider']} {report.time_text(r['median'])}" for r in found.rows]
            line += [*found.wrong, *found.left_out]
            print(f"{name}, {curve.axis} {size:,}: {', '.join(line)}", file=sys.stderr)
    return stored
