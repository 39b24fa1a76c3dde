"""A memory checker for kernels in Triton's interpreter, which itself reads and writes any address.

Inside `checked_memory()` every access of every program must lie in an element of an argument of its
launch, a load must not see what nothing wrote since torch.empty, no two programs of a launch may
access an element that one of them writes, and no two lanes of a store may write the same one.
"""

import contextlib
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

NOBODY, SEVERAL = -1, -2


class Region:
    """The bytes of a storage during one launch: which are arguments, who read and wrote each."""

    def __init__(self, storage):
        self.start, size = storage.data_ptr(), storage.nbytes()
        self.reachable = np.zeros(size, bool)
        self.writer = np.full(size, NOBODY)
        self.reader = np.full(size, NOBODY)

    def allow(self, tensor):
        _bytes(self.reachable, tensor).fill_(True)


def _bytes(array, tensor):
    """The bytes of a tensor's elements, as a view of `array`, which runs over its storage."""
    item = tensor.element_size()
    sizes = [*tensor.shape, item]
    strides = [*(item * stride for stride in tensor.stride()), 1]
    whole = torch.from_numpy(array)
    return whole.as_strided(sizes, strides, item * tensor.storage_offset())


class Memory(TorchDispatchMode):
    """What was allocated and not yet written, and the launch that runs now."""

    def __init__(self, by_address):
        super().__init__()
        self.by_address = by_address
        self.fresh = {}  # address -> (storage, which of its bytes were written)
        self.regions = None  # of a launch
        self.kernels = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.regions is not None:
            return result  # the interpreter's own
        name = function.overloadpacket.__name__
        if name in ("empty", "empty_like", "empty_strided", "new_empty"):
            storage = result.untyped_storage()
            self.fresh[storage.data_ptr()] = storage, np.zeros(storage.nbytes(), bool)
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.write(value)
        return result

    def write(self, tensor):
        _, written = self.fresh.get(tensor.untyped_storage().data_ptr(), (None, None))
        if written is not None:
            _bytes(written, tensor).fill_(True)

    @contextlib.contextmanager
    def launch(self, kernel, arguments):
        self.kernels.add(kernel)
        regions = {}
        for tensor in [*arguments, *self.by_address]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                regions.setdefault(storage.data_ptr(), Region(storage)).allow(tensor)
        self.regions, self.kernel = list(regions.values()), kernel
        try:
            yield
        finally:
            self.regions = None

    def access(self, pointers, mask, program, stores):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        size = max(size, 1)
        where, active = np.broadcast_arrays(pointers.data, mask.data)
        where = where[active.astype(bool)].astype(np.int64)
        verb = "writes" if stores else "reads"
        known = np.zeros(where.shape, bool)
        for region in self.regions:
            at = where - region.start
            inside = (at >= 0) & (at + size <= len(region.reachable))
            at = at[inside]
            if not at.size:
                continue
            known[inside] = region.reachable[at] & region.reachable[at + size - 1]
            assert self._is_alone(region, at, program, stores), (
                f"{self.kernel}: two programs or lanes race, one {verb}"
            )
            _, written = self.fresh.get(region.start, (None, None))
            if written is not None and stores:
                for byte in range(size):
                    written[at + byte] = True
            elif written is not None:
                assert written[at].all(), f"{self.kernel} {verb} what nothing wrote"
        assert known.all(), f"{self.kernel} {verb} outside of its arguments"

    @staticmethod
    def _is_alone(region, at, program, stores):
        """Whether no other program wrote these bytes, nor read them if this one writes."""
        writer, reader = region.writer[at], region.reader[at]
        alone = ((writer == NOBODY) | (writer == program)).all()
        if stores:
            alone &= ((reader == NOBODY) | (reader == program)).all()
            alone &= len(np.unique(at)) == len(at)
            region.writer[at] = program
        else:
            once = (reader == NOBODY) | (reader == program)
            region.reader[at] = np.where(once, program, SEVERAL)
        return alone


@contextlib.contextmanager
def checked_memory(by_address=()):
    """Check the launches inside; yields what saw them. `by_address`: tensors whose addresses the
    kernels find in tables."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    memory = Memory(by_address)
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def program():
        (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
        return (x * ny + y) * nz + z

    def checked_load(pointers, mask, *rest):
        memory.access(pointers, mask, program(), stores=False)
        return load(pointers, mask, *rest)

    def checked_store(pointers, value, mask, *rest):
        memory.access(pointers, mask, program(), stores=True)
        return store(pointers, value, mask, *rest)

    def checked_call(self, *arguments, **options):
        with memory.launch(self.fn.__name__, [*arguments, *options.values()]):
            return call(self, *arguments, **options)

    def unseen(*_):
        raise NotImplementedError("an access that the memory checker does not see")

    others = [
        name
        for name in dir(builder)
        if name.startswith(("create_atomic", "create_tensor_pointer", "create_descriptor"))
    ]
    with (
        mock.patch.multiple(
            builder,
            create_masked_load=checked_load,
            create_masked_store=checked_store,
            **dict.fromkeys(others, unseen),
        ),
        mock.patch.object(executor, "__call__", checked_call),
        memory,
    ):
        yield memory
