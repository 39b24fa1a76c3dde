"""The machine: card, clocks, versions, and the two ceilings that everything is held against."""

import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch

from benchmarks.gpu import clock
from benchmarks.gpu.job import Job

PACKAGES = ("torch", "triton", "numpy", "pytest", "matplotlib", "liger-kernel", "nvidia-cudnn-cu13")
QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "power.draw,power.limit,temperature.gpu,utilization.gpu,mig.mode.current"
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def run(job: Job) -> None:
    job.note(
        python=platform.python_version(),
        kernel=platform.release(),
        cores=os.cpu_count(),
        packages={name: _version(name) for name in PACKAGES},
        cuda=torch.version.cuda,
        commit=_first_line("git", "describe", "--always", "--dirty", "--abbrev=12"),
        nvcc=_last_line("nvcc", "--version"),
        tuning=os.environ.get("GPTK_TUNING") or "those that ship",
        compute_sanitizer=_last_line("compute-sanitizer", "--version"),
    )
    if job.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        job.note(
            card=card.name,
            capability=f"{card.major}.{card.minor}",
            multiprocessors=card.multi_processor_count,
            memory_bytes=card.total_memory,
            L2_bytes=getattr(card, "L2_cache_size", None),
            cudnn=torch.backends.cudnn.version(),
            idle=_card(),
        )
    job.note(copy_bandwidth=clock.copy_bandwidth(job.device))
    job.note(product_rates={n: clock.product_rate(d, job.device) for n, d in DTYPES.items()})
    job.note(after_load=_card())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> list[str]:
    """Lines that the command prints; none where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except subprocess.TimeoutExpired:
        return []
    return [line for line in done.stdout.splitlines() if line] if done.returncode == 0 else []


def _first_line(*command: str) -> str | None:
    return next(iter(_output(*command)), None)


def _last_line(*command: str) -> str | None:
    return next(iter(reversed(_output(*command))), None)


def _card() -> dict[str, str] | None:
    """What nvidia-smi reads of the card; it only reads."""
    line = _first_line("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    if line is None:
        return None
    return dict(zip(QUERY.split(","), (value.strip() for value in line.split(",")), strict=False))
