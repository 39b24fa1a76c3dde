"""The pytest side: options, the cases and providers to run, the table at the end.

pytest-benchmark times one function after another; here all providers of a case are timed in turns
first (measure.interleaved), and the samples are then handed to pytest-benchmark through its own
`timer`, so its statistics, storage and comparison work on them unchanged.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gptk.bench import measure, report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Replay:
    """A clock that shows recorded durations, one per pair of calls; a real one when it has none."""

    def __init__(self) -> None:
        self.samples: Iterator[float] | None = None
        self.running = False

    def __call__(self) -> float:
        if self.samples is None:
            return time.perf_counter()
        self.running = not self.running
        return 0.0 if self.running else next(self.samples)


REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gptk bench")
    group.addoption("--op", action="append", default=[], help="ops, or model; default: all")
    group.addoption("--device", dest="bench_device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--dtype", dest="bench_dtype", action="append", default=[], choices=DTYPES)
    group.addoption("--backend", dest="bench_backend", action="append", default=[])
    group.addoption("--case", dest="bench_case", action="append", default=[])
    group.addoption("--no-table", action="store_true", help="leave out gptk's own table")


@pytest.fixture(scope="session")
def roofline(request: pytest.FixtureRequest) -> dict[str, float]:
    """Bandwidths of copying and reading, and matrix peaks, measured in this run."""
    device = request.config.getoption("bench_device")
    found = {"copy": measure.copy_bandwidth(device), "read": measure.read_bandwidth(device)}
    for name in chosen_dtypes(request.config):
        found[name] = measure.product_peak(DTYPES[name], device)
    return found


@pytest.fixture
def record(benchmark: Any) -> Callable[..., None]:
    """record(seconds, **columns): hand recorded samples to pytest-benchmark."""

    def give(seconds: list[float], **columns: Any) -> None:
        benchmark.extra_info.update(columns)
        REPLAY.samples, REPLAY.running = iter(seconds), False
        try:
            benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)
        finally:
            REPLAY.samples = None
        report.ROWS.append(report.row(seconds, columns))

    return give


def chosen_dtypes(config: pytest.Config) -> list[str]:
    """--dtype; default float32, and bfloat16 where the device is fast at it."""
    given: list[str] = config.getoption("bench_dtype")
    if given:
        return given
    from gptk.train.hardware import choose_dtype

    device = torch.device(config.getoption("bench_device"))
    fast = choose_dtype("auto", device)[0] == torch.bfloat16
    return ["float32", "bfloat16"] if fast else ["float32"]


def chosen_backends(config: pytest.Config) -> list[str]:
    """--backend; default cpp and auto on a CPU, triton and auto on a GPU."""
    given: list[str] = config.getoption("bench_backend")
    return given or (["triton", "auto"] if config.getoption("bench_device") == "cuda" else ["cpp"])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["gptk"] = measure.facts(config.getoption("bench_device"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if report.ROWS and not config.getoption("no_table"):
        report.show(report.ROWS)
