"""Stopping a run from outside: the first signal asks, the second one ends the process at once."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any


class Stop:
    """While entered, SIGINT and SIGTERM set `signum` instead of ending the process.

    The loop polls it: the step is finished, the run saved, the exit code is 128 + signum (130,
    143). Python delivers signals to the main thread only; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signum != 0

    def __call__(self) -> bool:
        return bool(self)

    @property
    def exit_code(self) -> int:
        """0 without a signal."""
        return 128 + self.signum if self.signum else 0

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum

    def __enter__(self) -> "Stop":
        for signum in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[signum] = signal.signal(signum, self._ask)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
