"""Two GPUs that are not there: torch's current device and streams, and launches that are noted.

torch.cuda.device, torch.cuda.stream, FakeTensor and Triton's JITFunction.run are the real ones; of
CUDA's runtime only what they call is replaced, and a kernel is noted where Triton hands it over.
"""

import contextlib
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Launched(NamedTuple):
    kernel: str
    device: int  # the current one
    stream: int  # that Triton launches on
    tensors: list[int]  # the devices of the tensors that it is given


class Stream(NamedTuple):
    device: torch.device
    cuda_stream: int


class Runtime:
    """What CUDA keeps for a thread: the current device, and the current stream of each."""

    def __init__(self):
        self.device = 0
        self.streams = [Stream(torch.device("cuda", i), 100 + i) for i in range(2)]
        self.launched = []
        self.fails = False

    def exchange(self, device):
        before = self.device
        if device >= 0:
            self.device = device
        return before

    def current_stream(self, device=None):
        index = getattr(device, "index", device)
        return self.streams[self.device if index is None else index]

    def set_stream(self, stream):
        self.device = stream.device.index  # as torch does
        self.streams[self.device] = stream

    def compiled(self, function):
        """A kernel as JITFunction.run wants it."""
        return SimpleNamespace(
            launch_metadata=lambda *_: None,
            function=None,
            packed_metadata=None,
            run=lambda *arguments: self.note(function.fn.__name__, arguments[3], arguments[9:]),
        )

    def note(self, kernel, stream, arguments):
        if self.fails:
            raise RuntimeError("the launch failed")
        devices = [t.device.index for t in arguments if isinstance(t, torch.Tensor)]
        self.launched.append(Launched(kernel, self.device, stream, devices))


def part(tensor, index):
    """tensor[index] of slices and numbers, for which torch itself needs CUDA's device guard."""
    axis = 0
    for each in index if isinstance(index, tuple) else (index,):
        if isinstance(each, slice):
            start, stop, step = each.indices(tensor.shape[axis])
            assert step == 1
            tensor, axis = tensor.narrow(axis, start, stop - start), axis + 1
        else:
            tensor = tensor.select(axis, each)
    return tensor


class Made(TorchDispatchMode):
    """Notes the devices of the tensors that are made inside."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.devices.add(str(result.device))
        return result


@contextlib.contextmanager
def fake_cuda():
    """Yields the runtime; inside, tensors may be made on cuda:0 and cuda:1 and have no values."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    runtime = Runtime()
    addresses = iter(range(2**20, 2**60, 2**8))
    active = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
        get_current_device=lambda: runtime.device,
        get_current_stream=lambda device: runtime.current_stream(device).cuda_stream,
    )
    before = driver._active
    driver.set_active(active)
    try:
        with (
            mock.patch.multiple(
                torch.cuda,
                is_available=lambda: True,
                current_device=lambda: runtime.device,
                current_stream=runtime.current_stream,
                set_stream=runtime.set_stream,
                get_device_capability=lambda device=None: (8, 0),
                _exchange_device=runtime.exchange,
                _maybe_exchange_device=runtime.exchange,
            ),
            mock.patch.object(
                JITFunction, "_do_compile", lambda function, *_: runtime.compiled(function)
            ),
            mock.patch.multiple(
                FakeTensor,
                data_ptr=lambda tensor: next(addresses),
                __getitem__=part,
                __setitem__=lambda tensor, index, value: aten.copy_(part(tensor, index), value),
            ),
            FakeTensorMode(),
        ):
            yield runtime
    finally:
        driver._active = before
