"""Several processes (ranks) that train one model: each takes its rows of a step's batch, and all make the same update.

`torchrun` and `accelerate launch` start them and set their numbers in the environment. One all-reduce a step averages the
gradients (gloo on a CPU, nccl on a GPU). `meet()` all-gathers one short text line per rank. A rank that fails sends its reason
there, so that all ranks stop with that reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError, StaminaError

# timeouts: in training, where rank 0 may be drawing pictures for on_task; at the start; and of a rank that has lost another
PATIENCE = timedelta(minutes=30)
GREETING, PARTING = timedelta(minutes=5), timedelta(seconds=10)
# bytes of a line, of which the first says how its rank is: it goes on, it fails, or it has lost another rank
LINE = 1024
WELL, STOPS, LOST = b"+", b"!", b"?"


class LostError(StaminaError):
    """Another rank has died or does not answer."""


@contextlib.contextmanager
def together(patience: timedelta | None = None) -> Iterator[Ranks]:
    """The `Ranks` that the environment describes; a single one where it describes none.

    Every rank must leave the block at the same place. An error in the block is sent to the other ranks, which raise
    StaminaError with its text at their next meeting. A LostError is replaced by the reason of the rank that was lost.
    """
    ranks = _from_environment(patience or PATIENCE)
    try:
        yield ranks
    except BaseException as error:
        ranks.leave(error)
        raise
    ranks.close()


def rank_here() -> int:
    """The number of this process, 0 where it is the only one. Rank 0 writes files and shows progress."""
    return _number("RANK") if _count() > 1 else 0


class Ranks:
    """This process as number `rank` of `count`, and number `local` on its machine. A single process sends nothing."""

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0, patience: timedelta = PATIENCE, owns: bool = False):
        self.rank, self.count, self.local, self.patience, self.owns = rank, count, local, patience, owns
        self.messages = dist.new_group(backend="gloo", timeout=patience) if count > 1 else None
        self.gradients, self.over = None, count == 1

    def device(self, wanted: str | torch.device | None) -> str | torch.device | None:
        """The device of this rank: `wanted`, or with several ranks on GPUs the one with this rank's local number."""
        if self.count == 1:
            return wanted
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type != "cuda":
            return device
        if device.index is not None:
            raise InputError(f"device must be 'cuda' for {self.count} processes, got '{device}'; each takes a GPU of its own")
        there = torch.cuda.device_count()
        if self.local >= there:
            raise InputError(f"process {self.local} of this machine has no GPU, there are {there}; start no more than these")
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def rows(self, batch: int) -> tuple[int, slice]:
        """(size of the batch over all ranks, this rank's rows of it), where each rank takes `batch` rows."""
        return self.count * batch, slice(self.rank * batch, (self.rank + 1) * batch)

    def connect(self, device: torch.device) -> None:
        """Prepare `average_` for tensors on `device`. Raises StaminaError unless all ranks have the same kind of device."""
        if self.count == 1:
            return
        self.agree(device.type, "trains on another kind of device")
        backend = "nccl" if device.type == "cuda" else "gloo"
        self.gradients = dist.new_group(backend=backend, timeout=self.patience)
        # nccl connects at its first call, which must not be captured
        self.average_([torch.zeros(1, device=device)])

    @torch.no_grad()
    def average_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, with one all-reduce for all. They have one dtype and one device."""
        if self.count == 1:
            return
        packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
        try:
            dist.all_reduce(packed, group=self.gradients)
        except RuntimeError as error:
            raise self._lost(error) from error
        packed /= self.count
        for tensor, mean in zip(tensors, packed.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def meet(self, line: str = "") -> list[str]:
        """All-gather one short line per rank; return them in the order of ranks.

        Waits until all ranks are here. Raises StaminaError if one has stopped.
        """
        if self.count == 1:
            return [line]
        said = self._gather(WELL, line, self.patience)
        reason = _reason(said)
        if reason is not None:
            self.over = True
            self._disband(failed=True)
            raise StaminaError(reason)
        return [text for _, text in said]

    def agree(self, text: str, difference: str) -> None:
        """Raise StaminaError, "rank N `difference`", unless `text` is the same on all ranks."""
        said = self.meet(text)
        usual = Counter(said).most_common(1)[0][0]
        for rank, other in enumerate(said):
            if other != usual:
                raise StaminaError(f"rank {rank} {difference}; rank {said.index(usual)} is the measure")

    def leave(self, error: BaseException) -> None:
        """Send the reason why this rank stops to the others. If it stops because it lost one, raise the reason of that one."""
        if self.over:
            return
        self.over, lost = True, isinstance(error, LostError)
        # wakes the ranks that wait for this one's gradients on a CPU; on a GPU the host does not wait for gradients
        if self.gradients is not None and dist.get_backend(self.gradients) == "gloo":
            dist.destroy_process_group(self.gradients)
            self.gradients = None
        line = str(error) if isinstance(error, StaminaError) else f"{type(error).__name__}: {error}"
        try:
            said = self._gather(LOST if lost else STOPS, line, PARTING if lost else self.patience)
        except LostError:
            self._disband(failed=True, gone=True)
            return
        self._disband(failed=True)
        reason = _reason(said)
        if lost and reason is not None:
            raise StaminaError(reason) from error

    def close(self) -> None:
        """Wait for all ranks, then close the connections. Raises StaminaError if another rank failed last."""
        if self.count == 1:
            return
        self.meet()
        self.over = True
        self._disband()

    def _disband(self, failed: bool = False, gone: bool = False) -> None:
        """Close the process groups.

        After a rank has `failed` or is `gone`, closing one may wait for it. Such groups are left open, or aborted on a GPU.
        """
        groups = [group for group in (self.gradients, self.messages) if group is not None]
        on_gpu = self.gradients is not None and dist.get_backend(self.gradients) == "nccl"
        if failed and on_gpu:
            self.gradients.abort()
        self.gradients = self.messages = None
        if gone or (failed and on_gpu):
            return
        for group in [None] if self.owns else groups:
            dist.destroy_process_group(group)

    def _gather(self, kind: bytes, line: str, patience: timedelta) -> list[tuple[bytes, str]]:
        text = (kind + " ".join(line.split()).encode())[:LINE]
        mine = torch.tensor(list(text.ljust(LINE, b"\0")), dtype=torch.uint8)
        said = [torch.empty_like(mine) for _ in range(self.count)]
        try:
            dist.all_gather(said, mine, group=self.messages, async_op=True).wait(patience)
        except RuntimeError as error:
            raise self._lost(error) from error
        whole = [bytes(tensor.tolist()).rstrip(b"\0") for tensor in said]
        return [(text[:1], text[1:].decode(errors="replace")) for text in whole]

    def _lost(self, error: Exception) -> LostError:
        # the library's message without its source location and its advice
        why = re.sub(r"^\[\S*\] ", "", str(error).strip()).split(". ")[0].splitlines()
        return LostError(
            f"rank {self.rank} lost another process ({why[0] if why else type(error).__name__}); see what that one said, and "
            "go on with --resume"
        )


def _reason(said: list[tuple[bytes, str]]) -> str | None:
    """Why the ranks stop: the line of the first rank that failed, else of the first that lost another; None if none did."""
    for wanted in (STOPS, LOST):
        for rank, (kind, line) in enumerate(said):
            if kind == wanted:
                return line if line.startswith("rank ") else f"rank {rank}: {line}"
    return None


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names, shapes, dtypes and bits of tensors."""
    found = hashlib.sha256()
    for name, tensor in named:
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _from_environment(patience: timedelta) -> Ranks:
    count = _count()
    if count == 1:
        return Ranks()
    rank, local = _number("RANK"), _number("LOCAL_RANK")
    owns = not dist.is_initialized()
    try:
        if owns:
            dist.init_process_group("gloo", timeout=GREETING)
        return Ranks(rank, count, local, patience, owns)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        first = str(error).strip().splitlines()[0]
        raise StaminaError(f"the {count} processes did not meet at {where} ({first}); start them with torchrun") from error


def _count() -> int:
    return max(1, _number("WORLD_SIZE")) if "WORLD_SIZE" in os.environ else 1


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        said = f"got {value!r}" if value else "it is not set"
        raise InputError(f"{name} must be a number where WORLD_SIZE is set, {said}; start with torchrun, or unset WORLD_SIZE")
    return int(value)
