"""compute-sanitizer's memcheck and racecheck over a sample of each op's kernels.

memcheck sees the bounds of a tensor only where torch asks the driver for each one by itself
(PYTORCH_NO_CUDA_MEMORY_CACHING). A planted fault that the tool must find goes first.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.gpu import sample
from benchmarks.gpu.job import Job

HERE = Path(__file__).parent
PLANTED = {"memcheck": "memory", "racecheck": "race"}
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def find(tool: str) -> str | None:
    """On PATH, or where CUDA is usually put."""
    return shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")


def run(job: Job) -> None:
    tool, program = job.part, find("compute-sanitizer")
    if job.dry:
        job.note(absent="a dry run does without it")
        tools = list(PLANTED)
        for op in list(sample.CASES)[tools.index(tool) :: len(tools)]:  # each op once
            made = sample.run(op, "cpu", dry=True)
            job.add(tool=tool, op=op, calls=made, faults=None, why="not under the tool")
        return
    if program is None:
        job.note(absent="compute-sanitizer is not installed")
        return
    _planted(job, tool, program)
    if "absent" in job.facts:
        return
    with ThreadPoolExecutor(len(sample.CASES)) as pool:
        command = [sys.executable, "-m", "benchmarks.gpu.sample"]
        calls = {
            pool.submit(_checked, job, tool, program, [*command, op]): op for op in sample.CASES
        }
        for call in as_completed(calls):
            faults, words = call.result()
            job.add(tool=tool, op=calls[call], faults=faults, why=words if faults != 0 else "")


def _planted(job: Job, tool: str, program: str) -> None:
    """Does the tool find what is there to find?"""
    nvcc, binary = find("nvcc"), job.file.with_suffix(".planted")
    if nvcc is None:
        job.note(planted="not tried: nvcc is not installed")
        return
    build = [nvcc, "-arch=native", "-o", str(binary), str(HERE / "planted.cu")]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if built.returncode:
        job.note(planted=f"not tried: nvcc failed ({built.stderr.strip()[-200:]})")
        return
    faults, words = _checked(job, tool, program, [str(binary), PLANTED[tool]])
    binary.unlink()
    if not faults:
        job.note(absent=f"{tool} does not find a planted fault on this machine: {words}")
    else:
        job.note(planted=f"found, {faults} faults")


def _checked(job: Job, tool: str, program: str, command: list[str]) -> tuple[int | None, str]:
    """(faults, the end of what was said); None where there is no summary to read."""
    arguments = [program, "--tool", tool, "--print-limit", "5", *command]
    try:
        done = subprocess.run(
            arguments,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            text=True,
            capture_output=True,
            check=False,
            timeout=max(1.0, job.left() - 2),
        )
    except subprocess.TimeoutExpired:
        return None, "it was not done in time"
    said = done.stdout + done.stderr
    found = SUMMARY.search(said)
    faults = int(found.group(1)) if found else None
    if faults == 0 and done.returncode:  # nothing was found in a program that broke off
        faults = None
    return faults, said.strip()[-400:]
