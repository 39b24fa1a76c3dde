"""Builds the C++ extension where that is quick; it has no kernel for a GPU, so nothing needs it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.job import Job

ROOT = Path(__file__).resolve().parents[2]


def run(job: Job) -> None:
    """Into the run's own folder; setup.py keeps its CMake tree in the checkout's build/."""
    folder = job.out / "stages" / "extension"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | ({"GPTK_NO_NATIVE": "1"} if job.dry else {}),
            text=True,
            capture_output=True,
            check=False,
            timeout=max(1.0, job.left() - 3),
        )
    except subprocess.TimeoutExpired:
        job.add(built=False, why="it was not built in time")
        return
    found = sorted(folder.rglob("_C*.so"))
    if found:
        job.add(built=True, isa=load(found[0]).isa(), why="")
        return
    said = (done.stderr + done.stdout).strip().splitlines()
    job.add(built=False, why=said[-1][-300:] if said else "setup.py built none")


def load(file: Path) -> Any:
    """The extension in this file, whatever is installed."""
    spec = importlib.util.spec_from_file_location("gptk._C", file)
    assert spec is not None  # the file ends as an extension does
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # pybind11 fills it only now
    return module
