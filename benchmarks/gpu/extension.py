"""Builds the C++ extension where that is quick; it has no kernel for a GPU, so nothing needs it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.job import Job

ROOT = Path(__file__).resolve().parents[2]


def run(job: Job) -> None:
    """Into the run's own folder: the checkout stays as it is."""
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
    if not found:
        said = (done.stderr + done.stdout).strip().splitlines()
        job.add(built=False, why=said[-1][-300:] if said else "setup.py built none")
        return
    spec = importlib.util.spec_from_file_location("gptk._C", found[0])
    assert spec is not None  # the file ends as an extension does
    module = importlib.util.module_from_spec(spec)
    job.add(built=True, isa=module.isa(), why="")
