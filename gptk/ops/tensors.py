"""Tensors as kernels take them: given by address, cast for autocast, differentiated once."""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_FAKE = torch._C._TorchDispatchModeKey.FAKE


def tracing() -> bool:
    """True in torch.compile and torch.export, and under a mode that sees every operator, as that
    of fake tensors."""
    return torch.compiler.is_compiling() or _dispatch_modes() > 0


def addressable(*tensors: Tensor | None) -> bool:
    """Can a kernel be given these tensors' addresses, now? Not while a program is traced, and not
    those of fake tensors and other subclasses: for them an op is a custom op (compiled.py)."""
    if torch.compiler.is_compiling() or _dispatch_modes():
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return True


def check_addresses(op: str, *tensors: Sequence[Tensor]) -> None:
    """For an op that writes to its arguments, and so is no custom op: RuntimeError for tensors
    without an address, as fake tensors are."""
    plain = _PLAIN.issuperset(kind for each in tensors for kind in map(type, each))
    fake = _dispatch_modes() > 0 and torch._C._get_dispatch_mode(_FAKE) is not None
    if (fake or not plain) and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op} writes to the addresses of its tensors: fake tensors and other subclasses have "
            "none; take backend='torch' or torch.optim"
        )


_any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast has matrix-like ops compute in; None: it leaves them alone.

    It leaves float64 alone, as PyTorch's does.
    """
    if not _any_autocast():
        return None
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def readable(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor (in `dtype`) as a kernel reads it by address: contiguous, no pending negation."""
    if dtype is not None and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.contiguous()


def parameter(impl: ModuleType, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight or bias as `impl` reads it for products in `dtype` (None: in its own).

    An implementation whose products round float32 parameters themselves, in the pass that reads
    them, says so by `rounds_float32(dtype)`; for the others they are cast here.
    """
    if dtype is not None and tensor.dtype == torch.float32:
        rounds = getattr(impl, "rounds_float32", None)
        if rounds is not None and rounds(dtype):
            return readable(tensor)
    return readable(tensor, dtype)


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run an autograd.Function's forward or backward with autocast off: the casts are done."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _any_autocast():
            return function(*args, **kwargs)
        # as torch.autocast(device, enabled=False) does, which takes longer than a small kernel
        on = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
        try:
            for device in on:
                torch.set_autocast_enabled(device, False)
            return function(*args, **kwargs)
        finally:
            for device in on:
                torch.set_autocast_enabled(device, True)

    return run


def once_differentiable(backward: Callable[P, R]) -> Callable[P, R]:
    """Mark an autograd.Function's backward: with create_graph=True it is an error.

    torch's decorator of this name detaches the results instead, and a term of a second derivative
    can then be missing without a word.
    """

    @functools.wraps(backward)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_double_backward()
        return backward(*args, **kwargs)

    return run


def refuse_double_backward() -> None:
    """Raise RuntimeError if the backward that calls this is to be differentiated in turn."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True reached a gptk kernel, which has no second derivative; "
            "for double backward take backend='torch'"
        )
