"""The step as one CUDA graph, recorded once for all tasks and replayed from then on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch

from ..errors import InputError
from .step import Step

# steps that run uncaptured before the first recording: they compile kernels, make tables and allocate workspaces
WARM = 3
log = logging.getLogger("stamina_fast")


class CudaRecorder:
    """One CUDA graph with its own memory pool, recorded on its own stream."""

    def __init__(self, device: torch.device):
        self.device, self.stream, self.graph = device, torch.cuda.Stream(device), None

    def warm(self, step: Callable[[], None]) -> None:
        """Run a step on the stream that will record it, so that libraries allocate what they keep for each stream."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            step()
        here.wait_stream(self.stream)

    def record(self, step: Callable[[], None]) -> None:
        """Record the launches of a step without running them. An older graph is freed first, with its memory."""
        self.graph = None
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self.stream):
                step()
        finally:
            # a recording that fails leaves its own stream as the current one
            torch.cuda.set_stream(here)
        self.graph = graph

    def replay(self) -> None:
        self.graph.replay()


def recorder(wanted: bool | None, device: torch.device) -> CudaRecorder | None:
    """A recorder for this device, or None where steps run uncaptured.

    wanted: True, False, or None for "if there is a GPU". Raises InputError for True without a GPU.
    """
    if wanted and device.type != "cuda":
        raise InputError(f"capture needs a CUDA device, the model is on {device}; leave capture out to run step by step")
    return CudaRecorder(device) if device.type == "cuda" and wanted is not False else None


class Captured:
    """A `Step` that is recorded after `WARM` steps and replayed from then on. Without a recorder it always runs uncaptured.

    The first `WARM` steps are ordinary steps, and recording runs nothing. So no step is made twice and nothing is put back.

    A recording reads and writes fixed addresses. They are compared at the start of every task; where one has changed, the
    step is recorded again. That happens after the first fold, when the folded past of the forgetting penalty is allocated.

    A step that cannot be recorded is reported once, and training goes on uncaptured with the same bits. An optimizer that
    keeps numbers on the host is not recorded: its update runs after the recording of everything else.

    rows        the most rows by which the tables of the text encoders will grow
    tables      those of a step of another shape, to share them; None: new ones
    recordings  how often the step was recorded
    """

    def __init__(self, step: Step, recorder: CudaRecorder | None, rows: int, tables: Tables | None = None):
        self.step, self.recorder = step, recorder
        self.recorded = step if step.optimizer.capturable else step.gradient_
        if recorder is not None and tables is None and not step.optimizer.capturable:
            log.warning("the optimizer counts on the host: its step cannot be captured, and runs behind the captured rest")
        encoders = step.backbone.encoders if recorder is not None else []
        self.tables = tables or Tables([encoder.get_input_embeddings() for encoder in encoders], rows)
        self.warmed = self.recordings = 0
        self.addresses: list[int] | None = None

    def begin_(self, seed: int) -> None:
        """Call `Step.begin_`, and drop the recording if an address has changed."""
        self.step.begin_(seed)
        if self.addresses is not None and self.addresses != self.step.addresses():
            # one more ordinary step first, since new tensors may need other kernels compiled
            self.addresses, self.warmed = None, WARM - 1

    def __call__(self) -> None:
        if self.recorder is None:
            self.step()
            return
        self._run()
        if self.recorded is not self.step:
            self.step.optimizer.step_()

    def _run(self) -> None:
        """Run the part that is recorded: warm it up, record it or replay it."""
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
            # an error of the step itself is raised again by the uncaptured run
            log.warning("the training step cannot be captured and runs uncaptured: %s", reason(error))
            self.recorder = None
            return False
        self.addresses, self.recordings = self.step.addresses(), self.recordings + 1
        return True


def reason(error: BaseException) -> str:
    """The first error of a failed recording, in one line: ending the recording raises others on top."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Tables:
    """Keeps embedding tables at one address, although each task adds rows to each of them.

    embeddings  the modules; their tables are not trained
    more        the most rows that will be added
    """

    def __init__(self, embeddings: list[torch.nn.Embedding], more: int):
        self.embeddings = embeddings
        shapes = [(len(e.weight) + more, e.weight.shape[1]) for e in embeddings]
        self.memory = [e.weight.new_zeros(shape) for e, shape in zip(embeddings, shapes, strict=True)]

    @contextlib.contextmanager
    @torch.no_grad()
    def held(self) -> Iterator[None]:
        """Hold the tables at their fixed address within the block, with room at the end; restore them afterwards."""
        own = [embedding.weight.data for embedding in self.embeddings]
        for embedding, rows, memory in zip(self.embeddings, own, self.memory, strict=True):
            memory[: len(rows)].copy_(rows)
            embedding.weight.data = memory
        try:
            yield
        finally:
            for embedding, rows in zip(self.embeddings, own, strict=True):
                embedding.weight.data = rows
