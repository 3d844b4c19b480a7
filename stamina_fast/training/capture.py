"""The step as one CUDA graph: recorded once for a sequence of tasks, and replayed for every step after that."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch

from ..errors import InputError
from .step import Step

# steps that run as they are before the first recording: kernels get compiled, tables made and workspaces allocated
WARM = 3
log = logging.getLogger("stamina_fast")


class CudaRecorder:
    """One CUDA graph with a memory pool of its own, recorded on a stream beside the caller's."""

    def __init__(self, device: torch.device):
        self.device, self.stream, self.graph = device, torch.cuda.Stream(device), None

    def warm(self, step: Callable[[], None]) -> None:
        """Run a step where it will be recorded, so that what libraries keep for a stream is there."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            step()
        here.wait_stream(self.stream)

    def record(self, step: Callable[[], None]) -> None:
        """Write the launches of a step down; nothing runs. An older graph, and its memory, is given up first."""
        self.graph = None
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self.stream):
                step()
        finally:
            # a recording that fails leaves its own stream in force
            torch.cuda.set_stream(here)
        self.graph = graph

    def replay(self) -> None:
        self.graph.replay()


def recorder(wanted: bool | None, device: torch.device) -> CudaRecorder | None:
    """What records a step on this device; None where it is not wanted, or nobody asked and there is no GPU.

    Raises InputError where it is wanted and there is no GPU.
    """
    if wanted and device.type != "cuda":
        raise InputError(f"capture needs a CUDA device, the model is on {device}; leave capture out to run step by step")
    return CudaRecorder(device) if device.type == "cuda" and wanted is not False else None


class Captured:
    """A `Step` that is recorded once it is warm, and replayed from then on; without a recorder it always runs as it is.

    The first `WARM` steps are steps like any other and recording runs nothing, so that no step is done twice and nothing has
    to be put back. A recording reads and writes fixed addresses: they are compared at the start of every task, and where one
    has changed (the folded past of the forgetting penalty appears with the first fold) the step is recorded again. What
    cannot be recorded is said once, and training goes on step by step with the same bits. An optimizer that keeps numbers on
    the host is not recorded: it makes its step behind the recording of everything else.

    tasks       how many tasks there will be at most
    tables      of the step of another shape, which share them; None: of its own
    recordings  how often the step was recorded
    """

    def __init__(self, step: Step, recorder: CudaRecorder | None, tasks: int, tables: Tables | None = None):
        self.step, self.recorder = step, recorder
        self.recorded = step if step.optimizer.capturable else step.gradient_
        if recorder is not None and tables is None and not step.optimizer.capturable:
            log.warning("the optimizer counts on the host: its step cannot be captured, and runs behind the captured rest")
        encoders = step.backbone.encoders if recorder is not None else []
        self.tables = tables or Tables([encoder.get_input_embeddings() for encoder in encoders], tasks)
        self.warmed = self.recordings = 0
        self.addresses: list[int] | None = None

    def begin_(self, seed: int) -> None:
        """`Step.begin_`, and a new recording where the old one is no longer that of the step."""
        self.step.begin_(seed)
        if self.addresses is not None and self.addresses != self.step.addresses():
            # what is new is run once before it is recorded, as kernels may have to be compiled for it
            self.addresses, self.warmed = None, WARM - 1

    def __call__(self) -> None:
        if self.recorder is None:
            self.step()
            return
        self._run()
        if self.recorded is not self.step:
            self.step.optimizer.step_()

    def _run(self) -> None:
        """What is recorded, replayed where it is."""
        if self.warmed < WARM:
            self.warmed += 1
            self.recorder.warm(self.recorded)
        elif self.addresses is None and not self._record():
            self.recorded()
        else:
            self.recorder.replay()

    def _record(self) -> bool:
        try:
            self.recorder.record(self.recorded)
        except Exception as error:
            # a step that is wrong in itself raises again, uncaptured
            log.warning("the training step cannot be captured and runs uncaptured: %s", reason(error))
            self.recorder = None
            return False
        self.addresses, self.recordings = self.step.addresses(), self.recordings + 1
        return True


def reason(error: BaseException) -> str:
    """One line about where a failed recording began: ending it raises errors of its own on top."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Tables:
    """Embedding tables at one address from task to task, although each task adds a row to each of them.

    embeddings  the modules; their tables are not trained
    more        rows that will be added at most
    """

    def __init__(self, embeddings: list[torch.nn.Embedding], more: int):
        self.embeddings = embeddings
        shapes = [(len(e.weight) + more, e.weight.shape[1]) for e in embeddings]
        self.memory = [e.weight.new_zeros(shape) for e, shape in zip(embeddings, shapes, strict=True)]

    @contextlib.contextmanager
    @torch.no_grad()
    def held(self) -> Iterator[None]:
        """The tables at their fixed address, with room at the end, until the block ends; then they are as they were."""
        own = [embedding.weight.data for embedding in self.embeddings]
        for embedding, rows, memory in zip(self.embeddings, own, self.memory, strict=True):
            memory[: len(rows)].copy_(rows)
            embedding.weight.data = memory
        try:
            yield
        finally:
            for embedding, rows in zip(self.embeddings, own, strict=True):
                embedding.weight.data = rows
