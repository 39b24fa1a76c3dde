"""Compiles every kernel that a function launches, for a GPU that need not be there.

The ops' own launchers run, on small CPU tensors, while Triton's JIT function compiles instead of
launching: signatures, constants and specialisations are those of real launches. A process is either
interpreting or compiling, so this one must not have TRITON_INTERPRET=1.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from gptk.aot.cubin import Usage, read_cubin, usage
from gptk.aot.needs import Array


class Compiled(NamedTuple):
    """A kernel that was compiled, and the arguments of the launch by name."""

    kernel: str
    warps: int
    stages: int
    usage: Usage
    seconds: float
    ptx: str
    sass: str
    arguments: dict[str, Any]


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[Compiled]]:
    """Inside the block launches only compile, for compute capability `arch` (80: 8.0); the list
    that it yields grows by each.

    Raises:
        RuntimeError: the kernels of this process are interpreted.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from gptk.ops.triton_launch import INTERPRETED

    if INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET=1: the kernels of this process are interpreted")
    made: list[Compiled] = []
    known: dict[int, Compiled] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **meta)
        seconds = time.perf_counter() - start
        if id(kernel) not in known:
            arguments = dict(zip(self.arg_names, args, strict=False)) | meta
            arguments = {name: _plain(value) for name, value in arguments.items()}
            known[id(kernel)] = _described(self, kernel, arch, seconds, arguments)
        made.append(known[id(kernel)])
        return kernel

    before = driver._active
    driver.set_active(NamesAGpu(arch))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield made
    finally:
        driver._active = before


def _described(
    function: Any, kernel: Any, arch: int, seconds: float, arguments: dict[str, Any]
) -> Compiled:
    meta = kernel.metadata
    resources, sass = read_cubin(kernel.asm["cubin"])
    return Compiled(
        function.fn.__name__,
        meta.num_warps,
        meta.num_stages,
        usage(resources, sass, arch, meta.num_warps, meta.shared),
        seconds,
        kernel.asm["ptx"],
        sass,
        arguments,
    )


def _plain(value: Any) -> Any:
    """An argument without its storage: a tensor or its descriptor, or a dtype as a tensor of no
    dimension."""
    from triton.language import dtype
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, TensorDescriptor):
        value = value.base
    if isinstance(value, torch.Tensor):
        return Array(tuple(value.shape), value.dtype.itemsize)
    return Array((), value.primitive_bitwidth // 8) if isinstance(value, dtype) else value


class NamesAGpu:
    """A driver that knows what it would compile for and nothing else."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # the JIT's cache is per device

    def get_current_stream(self, device: int) -> int:
        return 0
