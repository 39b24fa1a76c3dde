"""The tests marked gpu, run by pytest in this process; every outcome is a row at once.

Plugins that are installed beside pytest are left out: the tests need none.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.job import Job

ROOT = Path(__file__).resolve().parents[2]
WORDS = 600


class Outcomes:
    """A pytest plugin: one row a test."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tuning = os.environ.get("GPTK_TUNING", "")

    def pytest_sessionstart(self) -> None:
        os.environ["GPTK_TUNING"] = self.tuning  # the tests' own set-up takes what ships

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.job.note(collected=len(session.items))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row: dict[str, Any] = dict(test=report.nodeid.split("::")[-1], outcome=report.outcome)
        if report.skipped and isinstance(report.longrepr, tuple):
            row["why"] = report.longrepr[2]
        elif report.failed:
            row["why"] = str(report.longrepr)[-WORDS:]
        self.job.add(**row, seconds=round(report.duration, 2))


def run(job: Job) -> None:
    os.chdir(ROOT)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    op, _, dtype = job.part.partition("/")
    only = f"[{op}- or [{op}]"
    if dtype:  # what names no dtype belongs to the first of these parts
        only = f"[{op}- and -{dtype}]" + (f" or [{op}]" if dtype == "float32" else "")
    arguments = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", only, "tests/gpu"]
    arguments += ["-W", "default"]  # what another version of torch deprecates is no wrong answer
    status = pytest.main(arguments, plugins=[Outcomes(job)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(status).name}")
