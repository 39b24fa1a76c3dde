"""Providers in turns, inputs rotated past the cache, a roofline measured in the same run."""

import functools
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from gptk import native

Call = Callable[[], Any]
LEAST_SECONDS = 0.6
"""Time given to each provider of a case, at least."""
LEAST_RUNS, MOST_RUNS = 10, 200


def synchronise(device: str) -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(calls: dict[str, list[Call]], device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each call, all providers in turns.

    Args:
        calls: provider -> the same work on several sets of inputs, taken in rotation so that a
            call does not find its inputs in the cache.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for functions in calls.values():
        for function in functions[:2]:  # warm-up: allocator, compiled code, thread pools
            function()
    first = max(_timed(functions[0], device) for functions in calls.values())
    runs = max(LEAST_RUNS, min(MOST_RUNS, int(LEAST_SECONDS / max(first, 1e-9))))
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for run in range(runs):
            for name, functions in calls.items():
                samples[name].append(_timed(functions[run % len(functions)], device))
    finally:
        if was_enabled:
            gc.enable()
    return samples


def _timed(function: Call, device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """(median, p20, p80)."""
    if len(seconds) < 2:
        return seconds[0], seconds[0], seconds[0]
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return statistics.median(seconds), cuts[1], cuts[7]


def peak_memory(function: Call, device: str = "cpu") -> int:
    """Bytes that one call holds at its worst, above what was held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    native.release_workspaces()  # they count
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    held = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def host_seconds(function: Call, calls: int = 20) -> float:
    """Until a call returns that only enqueues work on a GPU: the median."""
    samples = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(samples)


def copy_bandwidth(device: str = "cpu", seconds: float = 0.5) -> float:
    """Bytes per second, read and written, of copying 128 MB."""
    a = torch.ones(2**25, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * a.itemsize / _best(lambda: b.copy_(a), device, seconds)


def read_bandwidth(device: str = "cpu", seconds: float = 0.5) -> float:
    """Bytes per second of summing 256 MB: reads alone."""
    a = torch.ones(2**26, device=device)
    return a.numel() * a.itemsize / _best(a.sum, device, seconds)


def product_peak(dtype: torch.dtype, device: str = "cpu", seconds: float = 1.0) -> float:
    """FLOP/s of the best of a few square matrix products."""
    best = 0.0
    for n in (1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        multiply = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        best = max(best, 2 * n**3 / _best(multiply, device, seconds / 2))
    return best


def _best(function: Call, device: str, seconds: float) -> float:
    function()
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        least = min(least, _timed(function, device))
    return least


def facts(device: str) -> dict[str, Any]:
    """What a result needs to be understood later: machine, threads, versions, commit."""
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock_mhz": _clock_mhz(),
        "isa": native.isa() if native.available() is None else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        "commit": _commit(),
        "load_average": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _clock_mhz() -> float | None:
    try:
        with open("/proc/cpuinfo") as file:
            clocks = [float(line.split(":")[1]) for line in file if line.startswith("cpu MHz")]
    except OSError:
        return None
    return max(clocks, default=None)


def _commit() -> str | None:
    folder = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
