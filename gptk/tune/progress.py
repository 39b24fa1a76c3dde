"""What `gptk tune` shows while it measures: a bar on a terminal that has rich, else plain lines."""

import importlib.util
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from gptk.ops.tuning_file import Config
from gptk.train.progress import LINE_SECONDS, duration
from gptk.tune.choose import Outcome, Runner


class Progress:
    """Counts rows and configurations; `sizes` holds the number of configurations of each row."""

    def __init__(self, sizes: Sequence[int], bar: bool | None = None) -> None:
        self.sizes = sizes
        self.row = self.before = self.done = 0  # done counts the row's own configurations
        self.begun = self.shown = time.monotonic()
        self._bar: Any = None
        if bar is None:
            bar = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
        if bar:
            self._bar = _rich_bar()
            self._task = self._bar.add_task("", total=sum(sizes))

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        self.say(
            f"{len(self.sizes)} rows, {sum(self.sizes):,} configurations, each of which is "
            "compiled, run and compared with what ships"
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.shown = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def begin(self, name: str) -> None:
        """The next row."""
        self.before = sum(self.sizes[: self.row])
        self.row, self.done = self.row + 1, 0
        self.name = f"row {self.row} of {len(self.sizes)}: {name}"
        if self._bar is not None:
            self._show()
        else:
            self.say(f"{self.name}, {self.sizes[self.row - 1]} configurations{self._left()}")

    def compiled(self, done: int) -> None:
        """So many of the row's configurations are compiled before it is measured."""
        text = f"compiled {done} of {self.sizes[self.row - 1]}"
        if self._bar is not None:
            self._show(f", {text}")
        else:
            self._note(text)

    def tries(self, config: Config) -> None:
        """The row's next configuration."""
        self.done += 1
        if self._bar is not None:
            self._show()
        else:
            size = self.sizes[self.row - 1]
            self._note(f"configuration {self.done} of {size}: {list(config)}{self._left()}")

    def times(self, configs: Sequence[Config]) -> None:
        """Some are timed."""
        if self._bar is None:
            self._note(f"timing {len(configs)} configurations")

    def _note(self, text: str) -> None:
        """A plain line, if the last one is a while ago."""
        if time.monotonic() - self.shown >= LINE_SECONDS:
            self.say(f"    {text}")

    def _show(self, more: str = "") -> None:
        done = self.before + max(self.done - 1, 0)
        self._bar.update(self._task, completed=done, description=self.name + more)
        self._bar.refresh()

    def _left(self) -> str:
        """About how long the rest takes, once a row is behind."""
        if not self.before:
            return ""
        done = self.before + max(self.done - 1, 0)
        left = (time.monotonic() - self.begun) / done * (sum(self.sizes) - done)
        return f", about {duration(left)} left"


class Watched:
    """A runner that tells of what it does."""

    def __init__(self, runner: Runner, progress: Progress) -> None:
        self.runner, self.progress = runner, progress

    def run(self, config: Config) -> Outcome:
        self.progress.tries(config)
        return self.runner.run(config)

    def times(self, configs: Sequence[Config]) -> list[list[float]]:
        self.progress.times(configs)
        return self.runner.times(configs)


def _rich_bar() -> Any:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        auto_refresh=False,  # no thread of its own beside what is timed
    )
