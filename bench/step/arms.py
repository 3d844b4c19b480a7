"""The arms of a step: ours by any backend, and the same step with plain frozen projections; `loops` has diffusers'.

All learn the same concept from the same pictures, with the same random draws at each step. They share one set of frozen weights
(`models.sharing`), so that they can take turns in one process.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stamina_fast as sf
from stamina_fast.adapter.config import StaminaConfig
from stamina_fast.adapter.tokens import TokenBank
from stamina_fast.io.concepts import Concept
from stamina_fast.seeds import derive_seed
from stamina_fast.training import TrainOptions
from stamina_fast.training.capture import Captured, recorder
from stamina_fast.training.data import Feed
from stamina_fast.training.latents import LatentBank, encode, variants
from stamina_fast.training.loop import Trainer
from stamina_fast.training.methods import settings
from stamina_fast.training.unet import prepared, stepping

from .models import Model
from .phases import (
    BACK_TEXT,
    BACK_UNET,
    DRAWS,
    OPTIMIZER,
    TEXT,
    UNET,
    Mark,
    Phases,
    projections_of,
    replaced,
)

TOKEN, WORD, SEED, PICTURES = "<new1>", "sks", 0, 4


@dataclass(frozen=True)
class Case:
    """What is trained: `pixels` the side of a picture, `steps` of a concept, `choices` more of our trainer's options."""

    name: str
    model: Model
    pixels: int
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    steps: int = 500
    checkpointing: bool = False
    choices: dict[str, bool | str] = field(default_factory=dict)

    @property
    def options(self) -> TrainOptions:
        return TrainOptions(batch=self.batch, resolution=self.pixels, steps=self.steps, seed=SEED,
                            gradient_checkpointing=self.checkpointing, **self.choices)


class Recorded(LatentBank):
    """A bank that records which variants were drawn, for loops that encode the pictures themselves."""

    def draw(self, index: Tensor, noise: Tensor) -> Tensor:
        object.__setattr__(self, "asked", (index, noise))
        return super().draw(index, noise)


@dataclass(frozen=True)
class Lesson:
    """A concept: its pictures as squares [n, 3, pixels, pixels] on the device, and as the latents that ours keeps.

    encoding   seconds that encoding all variants once took
    """

    concept: Concept
    squares: Tensor
    bank: Recorded
    encoding: float


def lesson(case: Case, pipeline) -> Lesson:
    """Smooth random pictures and what the trainer makes of them before a concept's first step."""
    draw, options = torch.Generator().manual_seed(SEED), case.options
    rough = torch.rand(PICTURES, 3, 9, 9, generator=draw) * 2 - 1
    images = list(F.interpolate(rough, (case.pixels, case.pixels), mode="bicubic", align_corners=False).clamp(-1, 1))
    paths = tuple(Path(f"{index}.png") for index in range(PICTURES))
    concept = Concept("thing", paths, f"a photo of {TOKEN}", TOKEN)
    start = time.perf_counter()
    crops = variants(images, case.pixels, options.crops, options.crop_scale, options.flip, SEED)
    bank = encode(pipeline.vae, *crops, batch=case.batch)
    # waits for the device
    bank.mean.isfinite().all().item()
    seconds = time.perf_counter() - start
    return Lesson(concept, crops[0].to(case.device, case.dtype), Recorded(**vars(bank)), seconds)


class Arm:
    """One way to train: `start` makes what is trained, then every call is one optimizer step.

    note     what the loop does besides, in one line
    loss     of the last step, a scalar tensor
    """

    name = note = ""
    loss: Tensor

    def __init__(self, case: Case, lesson: Lesson, pipeline):
        self.case, self.lesson, self.pipeline = case, lesson, pipeline
        self.phases, self.index, self.open, self.watched = Phases(case.device), 0, contextlib.ExitStack(), False

    def start(self) -> None:
        raise NotImplementedError

    def step(self, index: int) -> None:
        raise NotImplementedError

    def gradient(self) -> float:
        """L2 norm of the gradient of everything that trains, at the last step, before it was clipped."""
        raise NotImplementedError

    def __call__(self) -> None:
        """Run the next step. After the last step of a concept it begins again with the first."""
        self.step(self.index % self.case.steps)
        self.index += 1

    def look(self) -> None:
        """What the host does every `TrainOptions.read_every` steps."""

    def close(self) -> None:
        self.open.close()

    @contextlib.contextmanager
    def eager(self):
        """Steps launch their work one by one, so that the launches can be counted."""
        self.watched = True
        try:
            yield
        finally:
            self.watched = False

    def wraps(self) -> list[tuple[object, str, object]]:
        """What `phases.replaced` changes while phases are recorded."""
        return [(module, "forward", self.phases.projection(module.forward)) for module in projections_of(self.pipeline.unet)]

    def once(self) -> dict[str, float]:
        """{phase: seconds} of one step, without what torch.compile made of it."""
        with self.eager(), torch.compiler.set_stance("force_eager"), replaced(self.wraps()), self.phases.record() as spent:
            self()
        return dict(spent)


class Plain:
    """What the step needs of adapters, for a U-Net whose projections stay plain: the token alone is trained."""

    def __init__(self, pipeline, config: StaminaConfig):
        self.noise, self.tau, self.stacks = None, 1.0, nn.ModuleList()
        self.tokens = TokenBank(pipeline, config, mlp=config.token_mlp, init=config.token_init)

    def named_parameters(self):
        return ((f"tokens.{name}", parameter) for name, parameter in self.tokens.named_parameters())

    def reset_(self, seed: int) -> None:
        """Only the token is trained, and `begin` starts it."""

    def detach(self) -> None:
        self.tokens.detach()


class Ours(Arm):
    """Our trainer's step. `backend` None leaves the projections plain: the least that a step with a token can cost."""

    def __init__(self, case: Case, lesson: Lesson, pipeline, name: str, backend: str | None, captured: bool = False):
        super().__init__(case, lesson, pipeline)
        self.name, self.backend, self.wanted = name, backend, captured
        self.note = "latents cached; token trained by an MLP; " + (
            "plain frozen projections" if backend is None else f"masked K/V by the {backend} backend"
        ) + ("; one CUDA graph" if captured else "") + "".join(f"; {name}: {value}" for name, value in case.choices.items())

    def start(self) -> None:
        config, options, _ = settings("stamina", StaminaConfig(), self.case.options, {})
        self.open.enter_context(prepared(self.pipeline.unet, options))
        adapters = Plain(self.pipeline, config) if self.backend is None else sf.attach(self.pipeline, config)
        self.open.callback(adapters.detach)
        self.trainer = trainer = Trainer(self.pipeline, adapters, [self.lesson.concept], config, options)
        adapters.reset_(derive_seed(SEED, "factors"))
        adapters.tokens.begin(TOKEN, derive_seed(SEED, "token"))
        ids = trainer.backbone.tokenise(list(self.lesson.concept.texts))
        bank = self.lesson.bank
        self.train = trainer.prepare(bank.mean.shape[1:], [part.shape[1] for part in ids])
        self.captured = Captured(self.train, recorder(self.wanted, trainer.device), rows=1)
        self.feed = Feed(bank, ids, self.case.pixels, trainer.diffusion.steps, derive_seed(SEED, "feed"))
        self.open.enter_context(stepping(self.pipeline.unet, options))
        self.open.enter_context(self.captured.tables.held())

    @contextlib.contextmanager
    def chosen(self):
        """Choose the backend by STAMINA_BACKEND, as a user would."""
        before = os.environ.get("STAMINA_BACKEND")
        if self.backend is not None:
            os.environ["STAMINA_BACKEND"] = self.backend
        try:
            yield
        finally:
            os.environ.pop("STAMINA_BACKEND", None)
            if before is not None:
                os.environ["STAMINA_BACKEND"] = before

    def step(self, index: int) -> None:
        train, options = self.train, self.trainer.options
        with self.chosen():
            if index == 0:
                self.captured.begin_(derive_seed(SEED, "gate"))
            with self.phases(DRAWS):
                self.feed.fill_(train.buffers, index)
                train.buffers.tau.fill_(self.trainer.config.tau(index / max(1, options.steps - 1)))
                train.optimizer.set_rate_(options.rate(index))
            # marks and counts are of the launches that a graph replays
            train() if self.watched else self.captured()
        self.loss = train.losses[index, 0]

    def look(self) -> None:
        self.train.trouble()
        if self.backend is not None:
            float(self.trainer.adapters.density())

    def gradient(self) -> float:
        return self.train.losses[(self.index - 1) % self.case.steps, -1].item()

    def wraps(self) -> list[tuple[object, str, object]]:
        train, phases = self.train, self.phases
        encode, backbone, optimizer = train.backbone.encode, train.backbone, train.optimizer

        def text(ids):
            with phases(TEXT):
                states, pooled = encode(ids)
                return Mark.apply(phases, BACK_TEXT, states)[0], pooled

        parts = ("zero_grads_", "value_norms", "norms", "scale_grads_", "step_")
        found = [(optimizer, part, phases.timed(OPTIMIZER, getattr(optimizer, part))) for part in parts]
        found += [(backbone, "encode", text), (backbone, "predict", phases.timed(UNET, backbone.predict)),
                  (torch.Tensor, "backward", phases.timed(BACK_UNET, torch.Tensor.backward))]
        if self.backend is None:
            return found + super().wraps()
        return found + [(stack, "project_all", phases.projection(stack.project_all)) for stack in self.trainer.adapters.stacks]
