"""Which implementation runs: resolve(), why_not(), explain(), use_backend().

A named backend runs or raises `Unsupported` with every reason; only `auto` may choose, by the
catalog's order of preference and its measured crossover sizes, and `explain` says what it chose.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from gptk.ops.catalog import BACKENDS, CROSSOVER, OPS, PREFERENCE, ROWS

P = ParamSpec("P")
R = TypeVar("R")


class _Default(threading.local):
    """What use_backend sets: an attribute, which torch.compile can guard, and an instance's, set
    in each thread, since of a class's default it would not see that an instance hides it."""

    def __init__(self) -> None:
        self.backend = "auto"


_default = _Default()


class Unsupported(RuntimeError):
    """The named backend cannot run this call; the message lists every reason and what can."""


def check_backend(name: str) -> str:
    """Return `name` if it is auto, torch, triton or cpp; otherwise raise ValueError."""
    if name != "auto" and name not in BACKENDS:
        allowed = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"backend={name!r} is not a backend; allowed: {allowed}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make `name` the backend of every call in this block that names none itself.

    The block's own thread only: a new thread starts with auto. A forward that checkpointing runs
    again in backward runs outside of the block too. In both places name the backend at the call
    (`backend=`) or in the module (its attribute `backend`). Around a compiled function and inside
    of one it does what it does in eager mode: with another default the function is compiled again.
    """
    before = _default.backend
    _default.backend = check_backend(name)
    try:
        yield
    finally:
        _default.backend = before


@functools.cache
def availability(backend: str) -> str | None:
    """None if `backend` can run on this machine at all, else one sentence: why not, what to do."""
    if check_backend(backend) == "cpp":
        return importlib.import_module("gptk.native").available()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton, Linux only)"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "no GPU that Triton can use; set TRITON_INTERPRET=1 to run the kernels "
                "in Triton's (slow) interpreter on the CPU, or take --backend=auto"
            )
    return None


def why_not(
    op: str, backend: str, device_type: str, dtype: torch.dtype, **traits: object
) -> str | None:
    """None if `backend` can run `op` on such tensors, else the reason in one sentence."""
    row = ROWS.get((op, backend))
    if row is None:
        return f"{backend} has no {op}"
    reason = availability(backend)
    if reason is not None:
        return reason
    if row.devices and device_type not in row.devices:
        return f"device {device_type} (needs {' or '.join(row.devices)})"
    name = str(dtype).removeprefix("torch.")
    if name not in row.dtypes:
        return f"dtype {name} (supported: {', '.join(row.dtypes)})"
    if backend == "torch":
        return None
    return _module(row.module).unsupported(device_type, dtype, **traits)


def resolve(
    op: str,
    backend: str | None,
    tensor: Tensor,
    dtype: torch.dtype | None = None,
    **traits: object,
) -> ModuleType:
    """The module that runs `op` for this tensor; `traits` are what `unsupported` may ask about.

    Raises Unsupported if a named backend cannot. The reference module stands for torch.
    """
    name = backend if backend is not None else _default.backend
    if transformed() and name != "torch":
        name = _without_kernels(op, name)
    key = (op, name, tensor.device, dtype or tensor.dtype, tuple(traits.items()))
    if op != "adamw" and torch.compiler.is_dynamo_compiling():  # adamw_ is no custom op
        return _traced(tensor, _backends(op, name, key[2].type, key[3], key[4]))
    candidates = _candidates.get(key)
    if candidates is None:
        candidates = _candidates[key] = _resolve(op, name, key[2].type, key[3], traits)
    if len(candidates) > 1:
        size = tensor.numel()
        for module, least in candidates:
            if size >= least:
                return module
    return candidates[-1][0]


_candidates: dict[tuple[Any, ...], list[tuple[ModuleType, int]]] = {}


def constant_when_traced(function: Callable[P, R]) -> Callable[P, R]:
    """Have torch.compile call this function while it traces, and keep the answer.

    What torch.compiler.assume_constant_result does, which would import all of torch's compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_traced
def _backends(
    op: str, backend: str, device: str, dtype: torch.dtype, traits: tuple[tuple[str, object], ...]
) -> list[tuple[str, int]]:
    """_resolve by name: torch.compile cannot keep a module that tracing has imported."""
    found = _resolve(op, backend, device, dtype, dict(traits))
    return [(backend_of(module), least) for module, least in found]


def _traced(tensor: Tensor, candidates: list[tuple[str, int]]) -> ModuleType:
    size = tensor.numel() if len(candidates) > 1 else 0
    for name, least in candidates[:-1]:
        if size >= least:
            return _NAMED[name]
    return _NAMED[candidates[-1][0]]


_NAMED = {b: ModuleType(".reference" if b == "torch" else f"{b}_impl") for b in BACKENDS}
"""What stands for an implementation in a traced program, which needs its name and nothing else."""


transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""True inside torch.func.grad, vmap and the like: their tensors have no address."""


def _without_kernels(op: str, backend: str) -> str:
    """The backend for a call inside a torch.func transform: torch, or Unsupported."""
    if check_backend(backend) == "auto":
        return "torch"
    raise Unsupported(
        f"{op}(backend={backend!r}) cannot run inside a torch.func transform (grad, vmap, ...)\n"
        f"  - {backend}: its kernels take addresses, which the transform's tensors do not have\n"
        f"  take backend='torch'"
    )


def _resolve(
    op: str, backend: str, device: str, dtype: torch.dtype, traits: dict[str, object]
) -> list[tuple[ModuleType, int]]:
    """(module, fewest elements) in order of preference; the last one takes any size."""
    names = PREFERENCE.get(device, ("torch",)) if check_backend(backend) == "auto" else (backend,)
    found = []
    for name in names:
        if why_not(op, name, device, dtype, **traits) is None:
            least = CROSSOVER.get((op, name, device), 0)
            if backend != "auto" or traits.get("dropout"):
                least = 0
            found.append((_module(ROWS[op, name].module), least))
    if not found:
        raise Unsupported(_refusal(op, backend, device, dtype, traits))
    return found


def kernels_of(
    ops: tuple[str, ...], backend: str | None, device: str, dtype: torch.dtype
) -> tuple[ModuleType, ...] | None:
    """The modules of one kernel backend for all of `ops`, or None (torch is no kernel backend).

    `auto` means the first backend of the order of preference, whatever the size: crossover sizes
    are of single calls, with what a call costs.
    """
    name = backend if backend is not None else _default.backend
    key = (ops, name, device, dtype)
    if key not in _kernels:
        if check_backend(name) == "auto":
            name = PREFERENCE.get(device, ("torch",))[0]
        able = name != "torch" and not any(why_not(op, name, device, dtype) for op in ops)
        _kernels[key] = tuple(_module(ROWS[op, name].module) for op in ops) if able else None
    return _kernels[key]


_kernels: dict[tuple[Any, ...], tuple[ModuleType, ...] | None] = {}


def _refusal(
    op: str, backend: str, device: str, dtype: torch.dtype, traits: dict[str, object]
) -> str:
    facts = "".join(f", {k}={v}" for k, v in traits.items())
    name = str(dtype).removeprefix("torch.")
    able = [b for b in BACKENDS if why_not(op, b, device, dtype, **traits) is None]
    return (
        f"{op}(backend={backend!r}) cannot run on {device} {name}{facts}\n"
        f"  - {backend}: {why_not(op, backend, device, dtype, **traits)}\n"
        f"  backends that can: {', '.join(able) or 'none'}.  See: gptk info"
    )


@functools.cache
def _module(path: str) -> ModuleType:
    return importlib.import_module(f"gptk.ops.{path}")


def implementation(op: str, backend: str) -> ModuleType:
    """The module of one row of the catalog."""
    return _module(ROWS[op, backend].module)


def backend_of(impl: ModuleType) -> str:
    """The name of the backend that an implementation belongs to."""
    return "torch" if is_reference(impl) else impl.__name__.rpartition(".")[2].removesuffix("_impl")


def is_reference(impl: ModuleType) -> bool:
    """True for the torch backend: its autograd is torch's own, the call is not wrapped."""
    return impl.__name__.endswith(".reference")


def explain(model: torch.nn.Module | None = None, dtype: torch.dtype | None = None) -> str:
    """Say, op by op, which backend runs and why each other does not.

    Args:
        model: its gptk layers are listed, with the device and dtype of their parameters;
            None explains every op for float32 on the CPU and, if there is one, on the GPU.
        dtype: the compute dtype to assume instead (under autocast, say).
    """
    lines = []
    for (op, backend, device, kind, by_size), count in _asked(model, dtype).items():
        where = f"{device} {str(kind).removeprefix('torch.')}"
        try:
            chosen = _chosen(op, backend, device, kind)
        except Unsupported as error:
            lines.append(str(error))
            continue
        reasons = [(b, why_not(op, b, device, kind)) for b in BACKENDS if b != chosen]
        others = "; ".join(f"{b}: {r or 'possible, not preferred here'}" for b, r in reasons)
        times = f" x{count}" if count > 1 else ""
        least = CROSSOVER.get((op, chosen, device), 0) if by_size else 0
        chosen += f" from {least:,} elements on, torch below" if least else ""
        lines.append(f"{op}{times} on {where}: {chosen} (asked: {backend}; {others})")
    return "\n".join(lines)


def chosen(model: torch.nn.Module, dtype: torch.dtype | None = None) -> dict[str, list[str]]:
    """Backend -> the ops of the model's layers that it runs, in their order.

    The key is "cpp or torch by size" (say) where `auto` decides at each call by the crossover.

    Raises Unsupported where a layer's named backend cannot run its op.
    """
    found: dict[str, list[str]] = {}
    for op, backend, device, kind, by_size in _asked(model, dtype):
        name = _chosen(op, backend, device, kind)
        if by_size and CROSSOVER.get((op, name, device)):
            name += " or torch by size"
        ops = found.setdefault(name, [])
        if op not in ops:
            ops.append(op)
    return found


def _asked(
    model: torch.nn.Module | None, dtype: torch.dtype | None
) -> dict[tuple[str, str, str, torch.dtype, bool], int]:
    """(op, backend asked for, device type, dtype, does size decide) -> in how many places.

    Size decides where auto resolves each call; layers that a module `fuses` are called as one.
    """
    asked: dict[tuple[str, str, str, torch.dtype, bool], int] = {}
    if model is None:
        for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
            for op in OPS:
                default = _default.backend
                asked[op, default, device, dtype or torch.float32, default == "auto"] = 1
        return asked
    place = next(model.parameters(), torch.empty(0))
    layers = list(model.modules())
    fused = {id(part) for m in layers if getattr(m, "fuses", False) for part in m.modules()}
    for layer in layers:
        for op in getattr(layer, "ops", ()):
            backend = getattr(layer, "backend", None) or _default.backend
            by_size = backend == "auto" and id(layer) not in fused
            key = (op, backend, place.device.type, dtype or place.dtype, by_size)
            asked[key] = asked.get(key, 0) + 1
    return asked


def _chosen(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    module, _ = _resolve(op, backend, device, dtype, {})[0]
    path = module.__name__.removeprefix("gptk.ops.")
    return next(b for b in BACKENDS if ROWS[op, b].module == path)
