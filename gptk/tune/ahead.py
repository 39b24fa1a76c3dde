"""Compiles a row's configurations in processes of their own, before they run on the GPU.

Triton compiles on one core. Here every core makes the launches of the row on tensors that have no
memory (device "meta") and leaves the kernels in Triton's cache on the disk, where the process that
measures finds them: source, arguments, architecture and options are those of its own launches. A
row is compiled as a whole before it is measured, so that nothing else runs while times are taken.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

from gptk.ops.tuning import trial
from gptk.ops.tuning_file import Config
from gptk.tune.cases import Case, work
from gptk.tune.gpu import first_line

MOST_JOBS = 16
"""By default: each has the libraries of PyTorch and Triton in memory."""


def default_jobs() -> int:
    """As many as this process has cores, up to MOST_JOBS."""
    return min(len(os.sched_getaffinity(0)), MOST_JOBS)


class Ahead:
    """`jobs` processes that compile for compute capability `arch`; with one job there are none."""

    def __init__(self, arch: int, jobs: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(jobs, spawn, initializer=_begin, initargs=(arch,))

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def compile(
        self,
        case: Case,
        configs: Sequence[Config],
        tell: Callable[[int], object],
        device: str = "meta",
    ) -> str | None:
        """Compile these, telling how many are done; returns what to say if none was, after which
        everything only takes longer."""
        if self._pool is None:
            return None
        failed = []
        try:
            every = [self._pool.submit(_compile, case, config, device) for config in configs]
            for done, made in enumerate(every):
                tell(done)
                failed.append(made.result())
        except BrokenProcessPool:
            self._pool = None
            return (
                "a process that compiles was killed or could not start (too little memory?): from "
                "here on one configuration after the other is compiled; --jobs 2 needs less memory"
            )
        return None if None in failed else f"nothing was compiled ahead ({failed[0]})"


def _begin(arch: int) -> None:
    """From here on this process compiles where it would launch, and ends with its parent."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from gptk.aot.compile import NamesAGpu

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once; the parent says what is to be said
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **meta)

    JITFunction.run = compile_only
    driver.set_active(NamesAGpu(arch))
    for stream in (1, 2):  # the process that measures says in its turn what does not compile
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _compile(case: Case, config: Config, device: str) -> str | None:
    """Why it does not compile; of a single one the run on the GPU says it again."""
    from triton.errors import TritonError

    try:
        with trial({}):
            made = work(case, device)
            with trial({case.key: config}):
                made.timed()
                made.also()
    except (TritonError, RuntimeError, MemoryError, OSError) as error:
        return first_line(error)
    return None
