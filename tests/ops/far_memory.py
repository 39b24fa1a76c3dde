"""Tensors whose elements lie more than 2^31 apart, in memory that is reserved and not taken.

The interpreter reads raw addresses, so a kernel whose offsets wrap reads elsewhere; with the checks
for overflow most such offsets are errors before that.
"""

import contextlib
import faulthandler
import functools
import math
import mmap
import os
import traceback
import warnings
from unittest import mock

import torch
from interpreter_checks import overflow_checks
from torch.utils._python_dispatch import TorchDispatchMode

MAP_NORESERVE = 0x4000  # Linux's: Python 3.12 and before have no name for it
LARGE = 2**20  # elements


def reserved(*shape, dtype=torch.float32, strides=None):
    """Zeros, of which only the pages that are written take memory."""
    strides = strides or [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    n = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, n * dtype.itemsize, flags), dtype=dtype)
    return memory.as_strided(shape, strides)


class ReservedOutputs(TorchDispatchMode):
    """Large tensors that are made without values are `reserved` ones."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in ("empty", "empty_like", "empty_strided", "new_empty"):
            made = function(*args, **{**kwargs, "device": torch.device("meta")})
            if made.numel() > LARGE:
                return reserved(*made.shape, dtype=made.dtype, strides=made.stride())
        return function(*args, **kwargs)


@contextlib.contextmanager
def programs(*modules, **chosen):
    """Inside, the launches of `modules` run a few programs of grids that may have billions of them.

    chosen: name of a kernel -> its programs, counted from the end where negative. Yields name of a
    kernel -> the arguments of its launch.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    seen = {}

    def launch(kernel, grid, device, *arguments, **meta):
        name = kernel.fn.__name__
        seen[name] = arguments
        grid = (*grid, 1, 1)[:3]
        for program in chosen[name]:
            x, yz = divmod(program % math.prod(grid), grid[1] * grid[2])
            place = x, *divmod(yz, grid[2])
            with mock.patch.multiple(
                builder,
                set_grid_dim=lambda *_: set_dim(*grid),
                set_grid_idx=lambda *_, place=place: set_idx(*place),
            ):
                kernel[(1,)](*arguments, **meta)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "launch", launch))
        yield seen
    assert seen.keys() == chosen.keys()


def in_a_child(test):
    """Run a test in a forked process: a bad address ends that one, and its memory goes with it.
    Overflows of 32 bits are errors there, and large outputs are `reserved`."""

    @functools.wraps(test)
    def forked(**arguments):
        receive, send = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python 3.12: forked beside threads, not used here
            child = os.fork()
        if child == 0:
            status = 1
            try:
                faulthandler.disable()  # the parent says what happened
                torch.set_num_threads(1)
                with overflow_checks(), ReservedOutputs():
                    test(**arguments)
                status = 0
            except BaseException:  # whatever it is, the parent is to say so
                os.write(send, traceback.format_exc().encode()[-60000:])
            finally:
                os._exit(status)
        os.close(send)
        with os.fdopen(receive) as pipe:
            said = pipe.read()
        status = os.waitpid(child, 0)[1]
        assert not os.WIFSIGNALED(status), (
            f"signal {os.WTERMSIG(status)}: an access to an address outside of every buffer"
        )
        assert status == 0, said

    return forked
