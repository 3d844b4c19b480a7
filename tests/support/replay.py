"""What a CUDA graph does to a step, on a CPU: the calls of one recorded step run again on its storages, without its Python.

Recording leaves no trace, as on a GPU, where it runs nothing: what it writes is put back. What reads the device, or copies from
the host, cannot be recorded. A replay refuses to touch memory that was the recorded step's own input and has since been given
up, moved or replaced: on a GPU it would read whatever lies there now.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")
# a tensor of Python's numbers, made on the host and copied from there
COPIES = ("lift_fresh", "lift_fresh_copy")


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def alias(leaf):
    """The same memory whatever becomes of the tensor."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


class Recording(TorchDispatchMode):
    """A step's calls, as (function, arguments, results).

    made     addresses of what the calls themselves allocate
    outside  {address: weak references to the tensors} of everything else that they read or write
    before   {address: (storage, its content before the step)} of what they write of that
    """

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.outside, self.before = [], set(), {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in READS:
            raise RuntimeError(f"{function} cannot be recorded: it reads the device")
        if function.overloadpacket.__name__ in COPIES:
            raise RuntimeError(f"{function} cannot be recorded: it copies from the host")
        inputs, writes = [t for t in tensors_in((args, kwargs)) if t.numel()], function._schema.is_mutable
        for tensor in inputs:
            self._meet(tensor, writes)
        out = function(*args, **kwargs)
        there = {address(tensor) for tensor in inputs}
        fresh = [alias(t) for t in tensors_in(out) if not writes and address(t) not in there]
        self.made.update(address(tensor) for tensor in fresh if tensor.numel())
        # a call that neither writes nor makes anything returns views, which stay what they are
        if writes or fresh:
            self.calls.append((function, tree_map(alias, args), tree_map(alias, kwargs), fresh))
        return out

    def _meet(self, tensor: torch.Tensor, written: bool) -> None:
        at = address(tensor)
        if at in self.made:
            return
        self.outside.setdefault(at, []).append(weakref.ref(tensor))
        if written and at not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before[at] = whole, whole.clone()

    def undo(self) -> None:
        for whole, before in self.before.values():
            whole.copy_(before)

    @torch.no_grad()
    def run(self) -> None:
        for at, owners in self.outside.items():
            if not any(owner() is not None and address(owner()) == at for owner in owners):
                raise AssertionError("the recording uses memory that is no longer there")
        for function, args, kwargs, fresh in self.calls:
            out = function(*args, **kwargs)
            for result, value in zip(fresh, tensors_in(out) if fresh else (), strict=True):
                result.copy_(value)


class Replay:
    """Takes the place of `CudaRecorder`."""

    def __init__(self):
        self.warmed = self.replayed = 0
        self.recording = None

    def warm(self, step):
        self.warmed += 1
        step()

    def record(self, step):
        self.recording = None
        recording = Recording()
        try:
            with recording:
                step()
        finally:
            recording.undo()
        self.recording = recording

    def replay(self):
        self.replayed += 1
        self.recording.run()
