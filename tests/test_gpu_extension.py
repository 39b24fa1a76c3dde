"""The last stage of `make gpu`: what it makes of a build of the C++ extension."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.gpu import extension
from benchmarks.gpu.job import Job
from gptk import native

BUILT = sorted((Path(__file__).resolve().parents[1] / "gptk").glob("_C*.so"))


def build(monkeypatch, tmp_path, made):
    """The row that the stage leaves if setup.py does this to the folder it is given."""

    def setup(command, **options):
        assert command[1] == "setup.py"
        assert options["timeout"] > 50
        folder = Path(command[-1])
        folder.mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", made(folder) or "")

    monkeypatch.setattr(extension.subprocess, "run", setup)
    (tmp_path / "stages").mkdir()
    job = Job("extension", "", tmp_path, False, time.monotonic() + 60)
    extension.run(job)
    (row,) = job.rows
    return row


@pytest.mark.skipif(not BUILT, reason="the C++ extension is not built: install with a compiler")
def test_an_extension_that_was_built_is_loaded_and_asked(monkeypatch, tmp_path):
    row = build(monkeypatch, tmp_path, lambda folder: str(shutil.copy(BUILT[0], folder)))
    assert row == dict(built=True, isa=native.isa(), why="")


def test_setups_last_line_says_why_nothing_was_built(monkeypatch, tmp_path):
    row = build(monkeypatch, tmp_path, lambda folder: "a warning\ngptk: cmake was not found\n")
    assert row == dict(built=False, why="gptk: cmake was not found")
