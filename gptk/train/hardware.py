"""The machine a run is on: device, precision, and the matrix-product peak that MFU refers to."""

import ctypes
import os
import time

import torch

from gptk.train.config import ConfigError, check_device

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str) -> torch.device:
    """The device for --device; auto takes a CUDA GPU if there is one, else the CPU.

    Raises:
        ConfigError: that device is not here.
    """
    check_device(wanted)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda:0" if gpus else "cpu")
    kind, _, number = wanted.partition(":")
    index = int(number or 0)
    if kind == "cuda" and index >= gpus:  # before torch, whose index is 8 bits
        remedy = f"at most cuda:{gpus - 1}" if gpus else "--device auto or cpu"
        raise ConfigError(
            f"--device {wanted}: PyTorch sees {gpus} CUDA device(s) here; take {remedy}"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: PyTorch sees no MPS device here; take --device cpu")
    return torch.device("cuda", index) if kind == "cuda" else torch.device(kind)


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(compute dtype, the reason in a few words) for --dtype on this device."""
    if wanted != "auto":
        slow = wanted != "float32" and device.type == "cpu" and not _cpu_has_bf16()
        return NAMES[wanted], "asked for" + ("; slow on this CPU" if slow else "")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "auto: the GPU has bfloat16"
        return torch.float32, "auto: the GPU has no bfloat16"
    if device.type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16, "auto: the CPU has AVX-512 BF16 or AMX"
    return torch.float32, f"auto: the {device.type.upper()} has no fast bfloat16"


def interpreted(backend: str) -> bool:
    """Whether the kernels run in Triton's interpreter: some thousand times slower than compiled."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def cpu_features() -> dict[str, bool]:
    """What decides about dtypes and kernels on this CPU, by name."""
    probes = {
        "AVX2": "_is_avx2_supported",
        "AVX-512": "_is_avx512_supported",
        "AVX-512 BF16": "_is_avx512_bf16_supported",
        "AMX": "_is_amx_tile_supported",
    }
    return {name: bool(getattr(torch.cpu, probe, bool)()) for name, probe in probes.items()}


def _cpu_has_bf16() -> bool:
    features = cpu_features()
    return features["AVX-512 BF16"] or features["AMX"]


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float | None:
    """FLOP/s of a large square matrix product, the best of several runs within `seconds`; None
    where it cannot be measured. It never reads or changes a random generator."""
    n = 4096 if device.type == "cuda" else 768
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = None
    deadline = time.perf_counter() + seconds
    runs = 0
    while runs < 3 or time.perf_counter() < deadline:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _synchronize(device)
        elapsed = time.perf_counter() - start
        runs += 1
        if runs > 1 and elapsed > 0:  # the first run pays for set-up
            best = elapsed if best is None else min(best, elapsed)
        if runs > 1 and time.perf_counter() > deadline + 2:
            break
    return None if best is None else 2 * n**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory() -> None:
    """Let this process keep what it frees (glibc; elsewhere nothing happens).

    A training step frees and takes the same memory again and again. By default glibc hands large
    blocks back to the system, and every page comes back as a fault, zeroed.
    """
    mmap_max, top_pad, trim_threshold = -4, -2, -1  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 64 << 20)


def environment(device: torch.device) -> dict[str, object]:
    """What a resumed run compares: the results are bit for bit the same where these are."""
    import gptk

    return {
        "gptk": gptk.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
