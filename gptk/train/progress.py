"""What a run shows while it runs: a bar on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

LINE_SECONDS = 10.0  # between plain lines


class _Steady:
    """A text stream that goes on without a reader: after the first failed write, into nothing."""

    def __init__(self, stream: Any, who: str) -> None:
        self._stream, self._who = stream, who

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def close_spare(self, before: Any) -> None:
        """Close what took the place of `before`, if anything did."""
        if self._stream is not before:
            self._stream.close()
            self._stream = before

    def _give_up(self, error: OSError) -> None:
        lost = self._stream
        self._stream = open(os.devnull, "w", encoding="utf-8")
        with contextlib.suppress(OSError, ValueError):  # what it still holds goes nowhere, too
            os.dup2(self._stream.fileno(), lost.fileno())
        with contextlib.suppress(OSError):
            reason = error.strerror or type(error).__name__
            print(f"{self._who}: nobody reads the output ({reason}); going on", file=sys.stderr)


@contextlib.contextmanager
def steady_display(who: str) -> Iterator[None]:
    """Inside, losing standard output (a closed pipe, a full disk) loses no more than the lines."""
    before = sys.stdout
    steady = _Steady(before, who)
    sys.stdout = steady
    try:
        yield
    finally:
        steady.flush()
        if sys.stdout is steady:
            sys.stdout = before
        steady.close_spare(before)


class Progress:
    """Shows records of metrics.jsonl as they come; `say` prints a line beside them."""

    def __init__(self, max_steps: int, step: int, bytes_per_token: float, bar: bool | None = None):
        self.max_steps = max_steps
        self.first = self.done = step
        self.nats_per_bpb = bytes_per_token * 0.6931471805599453  # loss / this = bits per byte
        self.begun = time.monotonic()
        self.shown = self.begun
        self._bar: Any = None
        if sys.stdout.isatty() if bar is None else bar:
            self._bar = _rich_bar()
            self._task = self._bar.add_task("", total=max_steps, completed=step, text="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def step(self, record: dict[str, Any]) -> None:
        """Show a step's training record."""
        self.done = record["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, text=self._text(record))
        elif self.done in (self.first + 1, self.max_steps) or self._line_is_due():
            self.shown = time.monotonic()
            self.say(f"step {self.done}/{self.max_steps}  {self._text(record)}  {self._left()}")

    def validated(self, step: int, nats: float, bits_per_byte: float, seconds: float) -> None:
        """Show a validation result."""
        self.say(
            f"step {step}/{self.max_steps}  validation loss {nats:.4f} nats per token, "
            f"{bits_per_byte:.4f} bits per byte ({seconds:.1f} s)"
        )

    def _line_is_due(self) -> bool:
        return time.monotonic() - self.shown >= LINE_SECONDS

    def _text(self, record: dict[str, Any]) -> str:
        mfu = "n/a" if record["mfu"] is None else f"{record['mfu']:.0%}"
        return (
            f"loss {record['loss']:.4f}  {record['loss'] / self.nats_per_bpb:.3f} bits/byte  "
            f"{record['tokens_per_s']:,.0f} tokens/s  MFU {mfu}"
        )

    def _left(self) -> str:
        per_step = (time.monotonic() - self.begun) / max(self.done - self.first, 1)
        return f"{duration((self.max_steps - self.done) * per_step)} left"


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _rich_bar() -> Any:
    from rich import progress

    return progress.Progress(
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
