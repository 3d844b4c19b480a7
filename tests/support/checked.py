"""Triton's interpreter with every access checked, launches watched, programs in another order; buffers with guards around them.

The few names of Triton that this takes hold of are the same from 3.6 to 3.9. Where one is gone, patching it raises; where
one is no longer called, `Checked` says so.
"""

import random
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pkgutil import iter_modules
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import KernelInterface
from triton.runtime.interpreter import GridExecutor, TensorHandle, interpreter_builder as builder

import stamina_fast.kernels

# bytes before and behind a buffer: more than a tile of the largest rows in the tests
GUARD = 1 << 16
FRESH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "clone", "_to_copy")
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NOBODY, SEVERAL = -1, -2


class Guards(TorchDispatchMode):
    """Every tensor made inside lies between guards, all of it bytes of ones: NaN in each floating dtype, until written."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def around(self, tensor):
        """A copy of `tensor` with its strides, where what lies between its elements is a guard too."""
        room = self.empty(tensor.shape, tensor.stride(), tensor.dtype)
        return room.copy_(tensor)

    def empty(self, shape, strides, dtype):
        elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        buffer = torch.full((elements * dtype.itemsize + 2 * GUARD,), 255, dtype=torch.uint8)
        tensor = buffer[GUARD:-GUARD].view(dtype).as_strided(shape, strides)
        self.kept.append((buffer, tensor))
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in FRESH or not out.numel():
            return out
        room = self.empty(out.shape, out.stride(), out.dtype)
        return room if "empty" in function.overloadpacket.__name__ else room.copy_(out)

    def assert_intact(self):
        """Nothing but the tensors' own elements was written."""
        for buffer, tensor in self.kept:
            bits = BITS[tensor.element_size()]
            whole = buffer.clone()
            whole[GUARD:-GUARD].view(bits).as_strided(tensor.shape, tensor.stride()).fill_(-1)
            assert (whole == 255).all(), f"written next to a tensor of shape {list(tensor.shape)}"


def kernel_names():
    """The names of every kernel that ships."""
    folder = stamina_fast.kernels.__path__
    modules = [import_module(f"stamina_fast.kernels.{found.name}") for found in iter_modules(folder)]
    everything = {name: value for module in modules for name, value in vars(module).items()}
    return {name for name, value in everything.items() if isinstance(value, KernelInterface) and name.endswith("_kernel")}


@contextmanager
def watched(called):
    """`called(name, executor, tensors)` before each launch: of a kernel by name, with the tensors it is given."""
    launch = GridExecutor.__call__

    def watching(executor, *arguments, **options):
        tensors = [t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor)]
        called(executor.fn.__name__, executor, tensors)
        return launch(executor, *arguments, **options)

    with patch.object(GridExecutor, "__call__", watching):
        yield


@contextmanager
def shuffled(seed):
    """The programs of each grid in an order that `seed` decides; gives {grid: the order in which they ran}."""
    orders, plain = {}, builder.set_grid_idx

    def elsewhere(*index):
        grid = builder.grid_dim
        if grid not in orders:
            places = list(np.ndindex(*grid))
            order = random.Random(seed).sample(places, len(places))
            # of two programs every second order is the plain one
            orders[grid] = dict(zip(places, order if order != places else order[::-1], strict=True))
        plain(*orders[grid][index])

    with patch.object(builder, "set_grid_idx", elsewhere):
        yield orders


class Extent:
    """The elements, by address, of tensors of one item size, and which programs of a launch read and wrote them."""

    def __init__(self, tensors):
        self.addresses = np.unique(np.concatenate([self.elements(t) for t in tensors]))
        self.readers, self.writers = (np.full(len(self.addresses), NOBODY) for _ in range(2))

    @staticmethod
    def elements(tensor):
        places = np.zeros((1,) * tensor.ndim, dtype=np.int64)
        for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            places = places + np.expand_dims(np.arange(size) * stride, [i for i in range(tensor.ndim) if i != axis])
        return (tensor.data_ptr() + places.ravel() * tensor.element_size()).astype(np.uint64)

    def find(self, addresses):
        """Where these addresses stand, or None where one is no element."""
        index = np.searchsorted(self.addresses, addresses)
        known = index < len(self.addresses)
        return index if known.all() and (self.addresses[index] == addresses).all() else None


class Checked(ExitStack):
    """While it lasts, every lane that a mask lets through must be an element of a tensor given to the launch.

    Elements, so that gaps between strides count as outside. What `guards` made counts as given where a launch is given its
    address. What `tl.multiple_of` promises must be so. No element may be written twice by one store, or by two programs, or
    written by one and read by another: then the order of the programs decides nothing. Raises InterpreterError at the access.
    """

    def __init__(self, guards=None):
        super().__init__()
        self.guards = guards
        self.extents, self.launched, self.accesses = {}, [], {"read": 0, "written": 0}

    def __enter__(self):
        super().__enter__()
        self.enter_context(watched(self.begin))
        for name, kind in (("create_masked_load", "read"), ("create_masked_store", "written")):
            self.enter_context(patch.object(builder, name, self.checking(getattr(builder, name), kind)))
        for name in dir(builder):
            if name.startswith("create_atomic"):
                self.enter_context(patch.object(builder, name, self.refuse))
        self.enter_context(patch.object(TensorHandle, "set_attr", self.promised))
        return self

    def __exit__(self, kind, *details):
        handled = super().__exit__(kind, *details)
        if kind is None:
            assert all(self.accesses.values()), f"the interpreter's accesses no longer pass here: {self.accesses}"
        return handled

    def begin(self, name, executor, tensors):
        self.launched.append(name)
        given = {value for t in tensors if t.dtype == torch.int64 for value in t.flatten().tolist()}
        reached = [t for _, t in self.guards.kept if t.data_ptr() in given] if self.guards else []
        by_size = {}
        for tensor in (*tensors, *reached):
            by_size.setdefault(tensor.element_size(), []).append(tensor)
        self.extents = {size: Extent(tensors) for size, tensors in by_size.items()}

    @staticmethod
    def refuse(*arguments, **options):
        raise RuntimeError("atomics are not checked")

    @staticmethod
    def promised(handle, name, values):
        if name != "tt.divisibility":
            raise RuntimeError(f"{name} is not checked")
        if (handle.data % np.array(values) != 0).any():
            raise IndexError(f"not a multiple of {values}")

    def checking(self, access, kind):
        def checked(pointers, *rest, **options):
            # load: pointers, mask, other; store: pointers, value, mask
            self.check(kind, pointers, rest[0 if kind == "read" else 1])
            return access(pointers, *rest, **options)

        return checked

    def check(self, kind, pointers, mask):
        self.accesses[kind] += 1
        extent = self.extents[pointers.get_element_ty().primitive_bitwidth // 8]
        lanes = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        index = extent.find(lanes)
        if index is None:
            raise IndexError(f"{self.launched[-1]}: {kind} outside its tensors")
        program = int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
        others = [extent.writers] if kind == "read" else [extent.writers, extent.readers]
        if any(((who[index] != NOBODY) & (who[index] != program)).any() for who in others):
            raise IndexError(f"{self.launched[-1]}: {kind} where another program reads or writes")
        if kind == "read":
            seen = extent.readers[index]
            extent.readers[index] = np.where((seen == NOBODY) | (seen == program), program, SEVERAL)
        elif len(np.unique(index)) < len(index):
            raise IndexError(f"{self.launched[-1]}: one element written twice at once")
        else:
            extent.writers[index] = program
