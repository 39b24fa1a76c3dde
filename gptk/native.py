"""The native extension gptk._C: loaded on first use, and what every cpp_impl.py shares.

The extension takes addresses and sizes (csrc/gptk.h), so it is tied to no torch version. torch is
imported first: its OpenMP runtime is then the one that the extension's threads come from.
"""

import functools
import importlib
import os
import re
import threading
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""torch dtype -> GPTK_* code of csrc/gptk.h."""

ACC = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}
"""dtype of a tensor -> dtype in which it is summed."""

ACTIVATION = {None: 0, "gelu": 1, "gelu_tanh": 2}
"""name of an activation -> GPTK_* code of csrc/gptk.h."""

MASK64 = 2**64 - 1

NOT_BUILT = (
    "the C++ extension is not built (a C++ compiler, cmake and pybind11 were missing when gptk was "
    "installed, or GPTK_NO_NATIVE was set); install a C++ compiler and reinstall gptk"
)

_module: ModuleType | None = None
_after_fork = False


def load() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it is not built, or cannot be loaded.
        ValueError: the environment variable GPTK_ISA names an instruction set that this build or
            this CPU does not have.
    """
    return _module if _module is not None else _load()


@functools.cache
def available() -> str | None:
    """None if the extension can be used, else one sentence: why not and what to do.

    A wrong GPTK_ISA is the caller's mistake, not an absence: it raises ValueError as load() does.
    """
    try:
        load()
    except RuntimeError as error:
        return str(error)
    return None


def isa() -> str:
    """The instruction set in use: baseline, avx2, avx512 or avx512_bf16."""
    return load().isa()


def isa_levels() -> tuple[str, ...]:
    """The instruction sets compiled in and supported by this CPU, lowest first."""
    return load().isa_levels()


def threads() -> int:
    """Threads for one call: torch's number; 1 in a forked child.

    The OpenMP runtime's pool does not exist in a child made by fork, and entering it there hangs.
    """
    return 1 if _after_fork else torch.get_num_threads()


MOST_WORKSPACE = 64 * 2**20
"""Bytes: what a call needs beyond that is returned to the system after the call."""


HUGE = 4 * 2**20
"""Bytes from which on `empty` asks for huge pages."""


def empty(shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """torch.empty on the CPU, for results. Large ones come on huge pages where Linux has them on
    request: every page of fresh memory is a fault, and 2 MiB take one instead of 512."""
    result = torch.empty(shape, dtype=dtype, device="cpu")
    size = result.numel() * dtype.itemsize
    if size >= HUGE:
        load().ask_for_huge_pages(result.data_ptr(), size)
    return result


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def workspace(name: str, elements: int, dtype: torch.dtype) -> Tensor:
    """Memory for one call (at least `elements`, contents undefined), kept for the next one.

    Fresh memory costs a page fault for every 4 KiB, which takes longer than many a kernel does. One
    buffer per thread, name and dtype; of two calls that overlap in time each needs its own name.
    """
    buffers = _kept.buffers
    buffer = buffers.get((name, dtype))
    if buffer is None or buffer.shape[0] < elements:
        with torch.inference_mode(False):  # it outlives the caller's modes
            buffer = empty(elements, dtype)
        if elements * dtype.itemsize <= MOST_WORKSPACE:
            buffers[name, dtype] = buffer
    return buffer


def release_workspaces() -> None:
    """Give this thread's workspaces back."""
    _kept.buffers.clear()


def alive(*tensors: Tensor | None) -> None:
    """Does nothing. Called after a kernel with what the kernel was given by address: a frame that
    torch.compile has cut there would else drop what it sees no more use of, before the kernel runs.
    """


def row_groups(rows: int) -> int:
    """Groups into which `rows` are split for sums over rows: a function of the size alone, so that
    the result has the same bits for any number of threads (csrc/row_groups.h)."""
    return load().row_groups(rows)


def keep_mask(seed: int, rows: int, cols: int, p: float) -> Tensor:
    """gptk.random.keep_mask on the CPU: bool (rows, cols), the same bits."""
    keep = torch.empty((rows, cols), dtype=torch.bool)
    load().keep_mask(keep.data_ptr(), rows, cols, p, seed & MASK64, threads())
    return keep


def _load() -> ModuleType:
    global _module
    try:
        extension = importlib.import_module("gptk._C")
    except ModuleNotFoundError as error:
        if error.name != "gptk._C":
            raise
        raise RuntimeError(NOT_BUILT) from None
    except ImportError as error:
        raise RuntimeError(f"the C++ extension cannot be loaded ({error}); rebuild gptk") from error
    if wanted := os.environ.get("GPTK_ISA"):
        extension.select_isa(wanted)
    _warn_of_two_openmp_runtimes()
    _module = extension
    return extension


def _forked() -> None:
    global _after_fork
    _after_fork = True


os.register_at_fork(after_in_child=_forked)


def _warn_of_two_openmp_runtimes() -> None:
    """Two runtimes have two thread pools, which fight for the cores; torch's settings reach one."""
    maps = Path("/proc/self/maps")
    found = sorted(openmp_runtimes(maps.read_text())) if maps.exists() else []
    if len(found) > 1:
        warnings.warn(
            f"two OpenMP runtimes are loaded, gptk's C++ backend may be slow: {', '.join(found)}",
            RuntimeWarning,
            stacklevel=3,
        )


def openmp_runtimes(maps: str) -> set[str]:
    """Paths of the GNU OpenMP runtimes in the text of a /proc/<pid>/maps."""
    return set(re.findall(r"(/\S*/libgomp[^/\s]*\.so[^/\s]*)", maps))
