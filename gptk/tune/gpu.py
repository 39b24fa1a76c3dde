"""Runs and times a kernel's work on the GPU of this process, one configuration after the other."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from gptk.flags import Failure
from gptk.ops.tuning import trial
from gptk.ops.tuning_file import Config
from gptk.tune.cases import Case, Results, Work
from gptk.tune.choose import Outcome, Refused

WARM_UPS = 3
FLUSH_BYTES = 2**28
"""Zeroed before each call: more than any GPU's L2 cache holds."""
FLUSH_MS = 0.5
"""For so long it is zeroed, while the host enqueues the call: the host's own time does not show."""


class GpuRunner:
    """choose.Runner for a case's work on torch's current GPU."""

    def __init__(self, case: Case, work: Work, rounds: int, device: str = "cuda") -> None:
        self.case, self.work, self.rounds = case, work, rounds
        self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self.flush.zero_()
        self.repeats = max(1, round(FLUSH_MS / max(self._flush_ms(), 1e-3)))

    def run(self, config: Config) -> Outcome:
        """The results of the work, twice, and the registers that kernels spill."""
        what = f"{self.case.kernel} with {list(config)}"
        with trial({self.case.key: config}), recording() as kernels, refusing(what):
            results, again = self._results(), self._results()
            torch.cuda.synchronize()
        spills: dict[str, int] = {}
        for kernel in kernels:  # a name stands for several variants
            spills[kernel.name] = max(spills.get(kernel.name, 0), kernel.n_spills)
        return Outcome(_tensors(results), _tensors(again), spills)

    def _results(self) -> Results:
        return [*self.work.timed(), *self.work.also()]

    def times(self, configs: Sequence[Config]) -> list[list[float]]:
        """Milliseconds of the timed work; in each round all take a turn, another one first."""
        for config in configs:
            with trial({self.case.key: config}):
                for _ in range(WARM_UPS):
                    self.work.timed()
        samples: list[list[float]] = [[] for _ in configs]
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            for turn in range(self.rounds):
                order = [(turn + i) % len(configs) for i in range(len(configs))]
                for i, milliseconds in zip(order, self._round(order, configs), strict=True):
                    samples[i].append(milliseconds)
        finally:
            if was_enabled:
                gc.enable()
        return samples

    def _round(self, order: Sequence[int], configs: Sequence[Config]) -> list[float]:
        events = []
        for i in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with trial({self.case.key: configs[i]}):
                for _ in range(self.repeats):
                    self.flush.zero_()
                start.record()
                self.work.timed()
                end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def _flush_ms(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.flush.zero_()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Errors of Triton and of the GPU, too little memory among them, become Refused; and Failure
    where `what` broke the GPU for this process."""
    from triton.errors import TritonError

    try:
        yield
    except Failure:
        raise
    except (TritonError, RuntimeError, MemoryError) as error:
        if _works():
            raise Refused(first_line(error)) from None
        raise Failure(
            f"{what} broke this process's use of the GPU ({first_line(error)}); rows measured "
            "before are kept; tune another --op"
        ) from None


@contextlib.contextmanager
def recording() -> Iterator[list[Any]]:
    """The list that it yields grows by each compiled kernel that is launched inside the block."""
    from triton.runtime.jit import JITFunction

    launched: list[Any] = []
    run = JITFunction.run

    def remember(self: Any, *args: Any, **meta: Any) -> Any:
        kernel = run(self, *args, **meta)
        launched.append(kernel)
        return kernel

    with mock.patch.object(JITFunction, "run", remember):
        yield launched


def _tensors(results: Results) -> list[torch.Tensor]:
    return [x for x in results if x is not None]


def _works() -> bool:
    """A kernel that read or wrote outside its memory leaves a GPU that refuses everything."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """An error in one sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no words'}"
