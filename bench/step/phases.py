"""Where the time of a step goes. Marks around its parts wait for the device, so these runs are not the timed ones."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from stamina_fast.pipeline.projections import find_projections

DRAWS, LATENTS, TEXT, PROJECTIONS, UNET = "draws", "encode latents", "text", "K/V", "U-Net forward"
LOSS, BACK_UNET, BACK_PROJECTIONS, BACK_TEXT = "loss and checks", "U-Net backward", "K/V backward", "text backward"
OPTIMIZER = "optimizer"
# in the order of a step. Time outside all others is of the loss, with penalties, checks and noising
PHASES = (DRAWS, LATENTS, TEXT, PROJECTIONS, UNET, LOSS, BACK_UNET, BACK_PROJECTIONS, BACK_TEXT, OPTIMIZER)


class Phases:
    """A stopwatch that is always in one phase. Off until `record`, and then `spent` holds seconds by phase."""

    def __init__(self, device: str):
        self.device, self.spent, self.phase, self.since = device, Counter(), None, 0.0

    @contextlib.contextmanager
    def record(self) -> Iterator[Counter]:
        self.spent = Counter()
        self.phase, self.since = LOSS, self._now()
        try:
            yield self.spent
            self.switch(LOSS)
        finally:
            self.phase = None

    def switch(self, phase: str) -> None:
        """The time since the last switch goes to the phase that it began."""
        if self.phase is not None:
            now = self._now()
            self.spent[self.phase] += now - self.since
            self.phase, self.since = phase, now

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = self.phase
        self.switch(phase)
        yield
        self.switch(before)

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, phase: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            with self(phase):
                return function(*arguments, **options)

        return call

    def projection(self, function: Callable) -> Callable:
        """A function of the text states whose forward is K/V, and whose backward is K/V's where the states have one."""

        def call(states: Tensor, *arguments, **options):
            with self(PROJECTIONS):
                if not states.requires_grad:
                    return function(states, *arguments, **options)
                y = function(Mark.apply(self, BACK_UNET, states)[0], *arguments, **options)
                if y is None:
                    return None
                return Mark.apply(self, BACK_PROJECTIONS, *y) if isinstance(y, tuple) \
                    else Mark.apply(self, BACK_PROJECTIONS, y)[0]

        return call


class Mark(torch.autograd.Function):
    """The same tensors. Once all their gradients are computed, the backward pass enters a phase."""

    @staticmethod
    def forward(context, phases: Phases, phase: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        context.phases, context.phase = phases, phase
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(context, *gradients):
        context.phases.switch(context.phase)
        return None, None, *gradients


@contextlib.contextmanager
def replaced(changes: list[tuple[object, str, Callable]]) -> Iterator[None]:
    """Replace attributes of objects by other functions until the block ends."""
    before = [(thing, name, vars(thing).get(name)) for thing, name, _ in changes]
    for thing, name, function in changes:
        setattr(thing, name, function)
    try:
        yield
    finally:
        for thing, name, function in reversed(before):
            delattr(thing, name) if function is None else setattr(thing, name, function)


def projections_of(unet: nn.Module) -> list[nn.Module]:
    """The modules that make K and V of the text, in whatever way they do."""
    trained = [
        module for name, module in unet.named_modules() if name.endswith(("to_k_custom_diffusion", "to_v_custom_diffusion"))
    ]
    return trained or list(find_projections(unet).values())
