"""How GPU work is timed, and what it is compared with: copies and matrix products, measured too.

Providers take turns, so that a slow moment of the card hits each of them. Before each call the L2
cache is overwritten and the GPU is kept busy for longer than the host needs to enqueue the call, so
the two events around it enclose kernels alone. What the host needs is measured by itself.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
FLUSH_BYTES = 256 * 2**20
"""Overwritten before each call: several times the L2 cache of any card so far."""
CYCLES_PER_SECOND = 2.0e9
LONGEST_LEAD = 0.01


def samples(
    calls: dict[str, Call], device: str, seconds: float, least: int = 5, most: int = 200
) -> dict[str, list[float]]:
    """Seconds of each call on the device, providers in turns, for about `seconds` in all.

    On a CPU these are a host clock's, of one turn: they show that the code runs and nothing more.
    """
    if device == "cpu":
        return {name: [_host_timed(call)] for name, call in calls.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    leads = {name: _lead(call) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(most):
        pairs = {}
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(leads[name])
            start.record()
            call()
            stop.record()
            pairs[name] = start, stop
        torch.cuda.synchronize()
        for name, (start, stop) in pairs.items():
            found[name].append(start.elapsed_time(stop) / 1e3)
        if turn + 1 >= least and time.perf_counter() > end:
            break
    return found


def _lead(call: Call) -> int:
    """Cycles that the GPU has to be busy while the host enqueues the call."""
    for _ in range(3):  # compiles, allocates
        call()
    return int(min(LONGEST_LEAD, 2 * host_seconds(call, "cuda", 5)) * CYCLES_PER_SECOND) + 20_000


def host_seconds(call: Call, device: str, turns: int = 10) -> float:
    """Until a call returns that only enqueues its work: the median."""
    found = []
    for _ in range(turns if device == "cuda" else 1):
        synchronize(device)
        found.append(_host_timed(call))
    synchronize(device)
    return statistics.median(found)


def _host_timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory(call: Call, device: str) -> dict[str, int | None]:
    """peak_bytes: what one call holds at its worst, above what was held before; returned_bytes: how
    much of that it returns. None on a CPU."""
    call()
    if device == "cpu":
        return dict(peak_bytes=None, returned_bytes=None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del kept
    return dict(peak_bytes=peak - before, returned_bytes=after - before)


def copier(passes: list[int], device: str) -> Call:
    """A copy for each pass of an op, that reads and writes so many bytes in all.

    All are between the same two tensors: like an op's own passes, the second may find in the L2
    cache what the first has left there.
    """
    a = torch.ones(max(passes) // 2, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    pairs = [(b[: n // 2], a[: n // 2]) for n in passes]

    def copy() -> None:
        for to, source in pairs:
            to.copy_(source)

    return copy


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of copying 1 GiB: the median."""
    a = torch.ones(2**28 if device == "cuda" else 2**12, device=device)
    b = torch.empty_like(a)
    times = samples({"copy": lambda: b.copy_(a)}, device, 1.0, most=50)["copy"]
    return 2 * a.numel() * a.itemsize / statistics.median(times)


def product_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a square matrix product of random numbers: the median."""
    n = 32 if device == "cpu" else 8192 if dtype.itemsize == 2 else 4096
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = samples({"mm": lambda: torch.mm(a, b, out=out)}, device, 1.0, most=30)["mm"]
    return 2 * n**3 / statistics.median(times)
