"""`train`: attach once, then for every concept fresh factors, N steps, fold, store; at the end a plain pipeline."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import dispatch, methods
from ..attach import attach
from ..config import StaminaConfig
from ..errors import InputError, StaminaError
from ..io.concepts import Concept, load_concepts
from ..io.files import new_folder
from ..io.images import load_image
from ..io.run import Checkpoint, Run
from ..seeds import derive_seed
from .backbone import Backbone, checkpointing, frozen, load_pipeline, no_bars, resolution_of
from .capture import Captured, recorder
from .checkpoint import restore_, state
from .diffusion import Diffusion
from .flat import Flat, Optimizer
from .latents import encode, variants
from .options import TrainOptions
from .progress import Reporter
from .record import check_same, digest_of, fingerprint
from .step import LOSSES, Buffers, Feed, Step


def train(
    model, concepts: str | Path | Sequence[Concept], output: str | Path, *, method: str = "stamina",
    config: StaminaConfig | None = None, options: TrainOptions | None = None, device=None, dtype: torch.dtype | None = None,
    resume: bool = False, progress: bool = True, on_task: Callable | None = None, **changes,
) -> Run:
    """Teach `model` the concepts one after another, folding each into its weights, and return the RUN folder.

    model     a Stable Diffusion 1.5, 2.1 or XL pipeline (left folded and plain), a diffusers folder, a hub id in the local
              cache, or "tiny"
    concepts  a folder with one folder of pictures a concept, a concepts_list.json, or a list of Concept
    output    the RUN folder: new or empty, or with `resume` one whose finished concepts are kept and not learned again
    method    a name in `methods.METHODS`; config and options are its starting point, and **changes are fields of either
              (`steps=300, rank=8, seed=1`)
    device, dtype   where and in what the model runs (`load_pipeline`); factors, losses and masters are fp32 in any case
    on_task   called as on_task(pipeline, run, concept) when a concept is folded and stored, the model being plain to sample

    Everything random is a function of (seed, task, step), so a run that is killed and resumed ends in the same bits. Raises
    StaminaError in one line; a concept whose numbers stop being finite is rolled back, and the concepts before it are kept.
    """
    config, options = settings(method, config or StaminaConfig(), options or TrainOptions(), changes)
    concepts = load_concepts(Path(concepts)) if isinstance(concepts, str | Path) else list(concepts)
    if not concepts:
        raise InputError("there are no concepts to learn; give at least one")
    pictures = [[load_image(path) for path in concept.images] for concept in concepts]
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    pipeline = load_pipeline(model, device, dtype)
    record = {
        "method": method, "model": name, "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(pipeline), "stamina": config.to_dict(), "train": options.as_dict(),
        "concepts": [describe(concept, images) for concept, images in zip(concepts, pictures, strict=True)],
    }
    with frozen(pipeline):
        adapters = attach(pipeline, config)
        try:
            # everything that can be refused is refused before a file is written
            trainer = Trainer(pipeline, adapters, concepts, config, options)
            run = Run.create(Path(output), record, resume=resume)
            check_same(run.config, record)
            trainer.restore(run)
            trainer.learn(run, pictures, progress, on_task)
        finally:
            adapters.detach()
    save_model(pipeline, run)
    return run


def save_model(pipeline, run: Run) -> None:
    """The folded pipeline as RUN/model, wholly there or not at all."""
    with no_bars(), new_folder(run.path / "model", replace=True) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)


def settings(method: str, config: StaminaConfig, options: TrainOptions, changes: dict):
    """(config, options) with `changes` to the fields of either, under a method. A field of both goes to the options."""
    ours, theirs = ({field.name for field in dataclasses.fields(kind)} for kind in (TrainOptions, StaminaConfig))
    unknown = sorted(set(changes) - ours - theirs)
    if unknown:
        raise InputError(f"there is no option {unknown[0]!r}; the options are {', '.join(sorted(ours | theirs))}")
    config = dataclasses.replace(config, **{key: value for key, value in changes.items() if key not in ours})
    options = dataclasses.replace(options, **{key: value for key, value in changes.items() if key in ours})
    return methods.apply(method, config, options)


def describe(concept: Concept, images: list[torch.Tensor]) -> dict:
    """What config.yaml says of a concept: its words, where its pictures are, and the hash of their pixels."""
    return {"name": concept.name, "token": concept.token, "prompt": concept.prompt, "class_prompt": concept.class_prompt,
            "texts": list(concept.texts), "folder": str(concept.images[0].resolve().parent), "pictures": digest_of(images)}


class Trainer:
    """One run on one device: the fixed buffers, the step over them, and what a task does before and after its steps."""

    def __init__(self, pipeline, adapters, concepts: Sequence[Concept], config: StaminaConfig, options: TrainOptions):
        self.pipeline, self.adapters, self.concepts = pipeline, adapters, concepts
        self.config, self.options, self.step, self.captured = config, options, None, None
        self.device = pipeline.unet.device
        self.recorder = recorder(options.capture, self.device)
        self.size = options.resolution or resolution_of(pipeline)
        factor = 2 ** (len(pipeline.unet.config.block_out_channels) - 1) * pipeline.vae_scale_factor
        if self.size % factor:
            raise InputError(f"resolution must be a multiple of {factor} for this model, got {self.size}")
        self.backbone = Backbone(pipeline)
        self.diffusion = Diffusion(pipeline.scheduler, self.device, options.min_snr)
        for concept in concepts:
            self.backbone.check_prompts(list(concept.texts), concept.token)

    def restore(self, run: Run) -> None:
        """Bring back the finished tasks of the run, from W_0 and the stored factors."""
        done = [task["name"] for task in run.tasks()]
        for concept, name in zip(self.concepts, done, strict=False):
            task = run.load_task(name)
            self.adapters.add_task(name, task.factors)
            self.adapters.tokens.add(concept.token, task.token)
        if done:
            self.adapters.rewind(done)

    def learn(self, run: Run, pictures: list[list[torch.Tensor]], progress: bool, on_task: Callable | None) -> None:
        """All concepts that the run has not learned yet."""
        done, saved = len(run.tasks()), run.load_checkpoint()
        if saved is not None and saved.task != self.concepts[done].name:
            wanted = self.concepts[done].name
            raise InputError(f"the checkpoint is of {saved.task!r}, next is {wanted!r}; pass the same concepts")
        with Reporter([c.name for c in self.concepts], done, self.options.steps, progress) as reporter:
            for task in range(done, len(self.concepts)):
                reporter.begin(task)
                curve, seconds = self.steps(run, task, pictures[task], reporter, saved)
                self.finish(run, task, curve, seconds)
                reporter.end(task, seconds)
                saved = None
                if on_task is not None:
                    on_task(self.pipeline, run, self.concepts[task])

    def steps(self, run: Run, task: int, images: list[torch.Tensor], reporter: Reporter, saved: Checkpoint | None):
        """All steps of one task, or those that `saved` leaves; the curve, a row a step, and the seconds they took.

        Raises StaminaError once something is not finite.
        """
        start, concept, options = time.perf_counter(), self.concepts[task], self.options
        seed = derive_seed(options.seed, "task", task)
        feed = self.begin(concept, images, seed)
        density, first = {}, 0
        with checkpointing(self.pipeline.unet, options.gradient_checkpointing), self.captured.tables.held():
            self.captured.begin_(derive_seed(seed, "gate"))
            if saved is not None:
                first = saved.step
                density, before = restore_(self.step, first, saved.tensors)
                start -= before
            read = first
            for i in range(first, options.steps):
                feed.fill_(i)
                self.step.buffers.tau.fill_(self.config.tau(i / max(1, options.steps - 1)))
                self.step.optimizer.set_rate_(options.rate(i))
                self.captured()
                done = i + 1
                if done % options.read_every == 0 or done == options.steps:
                    self.check(concept)
                    density[i] = float(self.adapters.density())
                    means = self.step.losses[read:done].mean(0).tolist()
                    reporter.update(task, done, dict(zip(LOSSES, means, strict=True)), density[i])
                    read = done
                if options.save_every and done % options.save_every == 0 and done < options.steps:
                    self.check(concept)
                    run.save_checkpoint(concept.name, done, state(self.step, done, density, time.perf_counter() - start))
        rows = self.step.losses.tolist()
        curve = [
            {"step": i, **dict(zip(LOSSES, row, strict=True))} | ({"density": density[i]} if i in density else {})
            for i, row in enumerate(rows)
        ]
        return curve, time.perf_counter() - start

    def begin(self, concept: Concept, images: list[torch.Tensor], seed: int) -> Feed:
        """A fresh task: factors, token, and what feeds its steps."""
        options = self.options
        self.adapters.reset_(derive_seed(seed, "factors"))
        self.adapters.tokens.begin(concept.token, derive_seed(seed, "token"))
        ids = self.backbone.tokenise(list(concept.texts))
        crops = variants(images, self.size, options.crops, options.crop_scale, options.flip, derive_seed(seed, "crops"))
        bank = encode(self.pipeline.vae, *crops, batch=options.batch)
        if self.step is None:
            self.step = self.prepare(bank.mean.shape[1:], [part.shape[1] for part in ids])
            self.captured = Captured(self.step, self.recorder, len(self.concepts))
        return Feed(self.step.buffers, bank, ids, self.size, self.diffusion.steps, derive_seed(seed, "feed"))

    def prepare(self, shape: tuple[int, int, int], lengths: list[int]) -> Step:
        """The buffers and the step, once for all tasks, so that no address changes between them."""
        named = [(name, p) for name, p in self.adapters.named_parameters() if p.requires_grad]
        token = [(name, p) for name, p in named if name.startswith("token")]
        other = [(name, p) for name, p in named if not name.startswith("token")]
        rates = [(Flat(other), self.options.learning_rate), (Flat(token), self.options.token_learning_rate)]
        optimizer = Optimizer(rates, self.options.betas, self.options.weight_decay)
        buffers = Buffers.empty(self.options.batch, shape, lengths, self.device)
        weights = self.config.sparsity_weight, self.config.forgetting_weight
        parts = self.options.accumulate
        share = torch.full((self.options.batch // parts,), 1 / parts, device=self.device) if parts > 1 else None
        return Step(self.backbone, self.adapters, self.diffusion, optimizer, buffers, self.options.steps, weights,
                    self.options.gradient_clip, parts, share)

    def check(self, concept: Concept) -> None:
        found = self.step.trouble()
        if found is not None:
            raise StaminaError(
                f"{concept.name}: {found}; the task is rolled back and the earlier ones are kept: lower the learning rate "
                "and train again"
            )

    def finish(self, run: Run, task: int, curve: list[dict], seconds: float) -> None:
        """Fold the factors and the token, if all of them are finite, and store the task."""
        concept, adapters = self.concepts[task], self.adapters
        wrong = [name for flat in self.step.optimizer.flats for name in flat.non_finite()]
        if wrong:
            raise StaminaError(f"{concept.name}: {wrong[0]} is not finite after the last step; the task is rolled back")
        adapters.noise = None
        density = float(adapters.density())
        embeddings = adapters.fold_(concept.name)
        info = {"name": concept.name, "token": concept.token, "prompt": concept.prompt, "seconds": seconds, "density": density,
                "steps": self.options.steps, "pictures": len(concept.images)}
        run.commit_task(concept.name, adapters.tasks[concept.name], embeddings, curve, info, folded_by=self.folded_by())

    def folded_by(self) -> dict[str, str]:
        """Whose bits the folded weights are."""
        dtype = self.pipeline.unet.dtype
        gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if gpu else platform.machine()
        return {"backend": dispatch.choose(None, self.device, dtype), "device": f"{self.device.type} {name}"}
