"""`train`: attach once; for every concept take fresh factors, make N steps, fold, store; leave a plain pipeline."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import reopen
from ..adapter.attach import attach
from ..adapter.config import StaminaConfig
from ..errors import InputError, StaminaError
from ..io.concepts import Concept, load_concepts, with_initializers
from ..io.files import new_folder
from ..io.progress import Progress
from ..io.run import Checkpoint, Run
from ..ops import dispatch
from ..pipeline.load import frozen, load_pipeline, no_bars
from ..seeds import derive_seed
from .attention import kernel_of_run
from .backbone import Backbone
from .buckets import CropSize
from .capture import Captured, recorder
from .checkpoint import restore_, state
from .data import Feed, Loader, TaskData, row_weights
from .diffusion import Diffusion
from .flat import Flat
from .methods import Strategy, settings
from .optimizers import check_optimizer, make_optimizer
from .options import TrainOptions
from .ranks import Ranks, digest, together
from .record import describe, open_run, record_of
from .start import share_of_a_word, warn_of_little_say
from .step import LOSSES, Buffers, Step
from .unet import prepared, stepping


def train(
    model, concepts: str | Path | Sequence[Concept], output: str | Path, *, method: str = "stamina",
    config: StaminaConfig | None = None, options: TrainOptions | None = None, device=None, dtype: torch.dtype | None = None,
    initializer_token: str | Mapping[str, str] | None = None, resume: bool = False, progress: bool = True,
    on_task: Callable | None = None, on_step: Callable | None = None, **changes,
) -> Run:
    """Teach `model` the concepts one after another, folding each into its weights, and return the RUN folder.

    model     a Stable Diffusion 1.5, 2.1 or XL pipeline, which is left folded and plain; or a diffusers folder, a hub id in
              the local cache, or "tiny"
    concepts  a folder with one folder of pictures a concept, a concepts_list.json, or a list of Concept
    output    the RUN folder, which must be new or empty
    method    a name in `methods.METHODS`
    config, options   where the method starts from; **changes are fields of either, or options of the method's own
              (`steps=300, rank=8, seed=1`; `methods.METHODS[method].strategy` has those of its own)
    device, dtype     where the model runs and in which dtype (`load_pipeline`); factors, losses and masters are always fp32
    initializer_token   the word that each concept's token starts from, or a word for the concept of a name; it comes before
              those that the concepts name themselves
    resume    go on with the run in `output`: its finished concepts are kept and not learned again
    on_task   called as on_task(pipeline, run, concept) when a concept is folded and stored; the pipeline can be sampled then
    on_step   called as on_step(step, task, i) before step i of a task is made; both count from 0. `step` is the `step.Step`
              that will run, and `step.buffers` holds the batch that it will read

    Several processes, started by torchrun or accelerate launch, train one model together (`ranks`). Each takes options.batch
    pictures a step; gradients are averaged, so that all have the same bits. Rank 0 shows progress, calls on_task and writes
    the RUN folder, which all ranks must see. Every rank calls on_step.

    Every picture is checked before a file is written, as far as that needs no decoding (`images.check_image`). It is decoded
    once, when its task begins. Damage that only decoding shows stops the run then, and the concepts before it are kept.

    Everything random is a function of (seed, task, step), so a run that is killed and resumed ends in the same bits. Raises
    StaminaError in one line. A concept whose numbers stop being finite is rolled back, and the concepts before it are kept.
    """
    config, options, strategy = settings(method, config or StaminaConfig(), options or TrainOptions(), changes)
    check_optimizer(options.optimizer)
    with together() as ranks:
        concepts = load_concepts(Path(concepts)) if isinstance(concepts, str | Path) else list(concepts)
        if not concepts:
            raise InputError("there are no concepts to learn; give at least one")
        if initializer_token is not None:
            concepts = with_initializers(concepts, initializer_token)
        described = [describe(concept, options.prior_weight > 0) for concept in concepts]
        named = isinstance(model, str | Path)
        pipeline = load_pipeline(model, ranks.device(device) if named or device is not None else None, dtype)
        record = {"method": method, "model": str(model) if named else type(model).__name__, "processes": ranks.count}
        record |= record_of(pipeline, config, options) | {"concepts": described}
        if strategy.own():
            record["method_options"] = strategy.own()
        if options.attention == "measured":
            record["measured"] = {"attention": kernel_of_run(Path(output), resume, pipeline, options, ranks)}
            options = dataclasses.replace(options, **record["measured"])
        ranks.connect(pipeline.unet.device)
        with frozen(pipeline), prepared(pipeline.unet, options):
            adapters = attach(pipeline, config)
            try:
                # whatever can be refused is refused before a file is written
                trainer = Trainer(pipeline, adapters, concepts, config, options, ranks, strategy)
                run = open_run(Path(output), record, resume, ranks)
                trainer.restore(run)
                trainer.learn(run, progress and ranks.rank == 0, on_task, on_step)
            finally:
                strategy.close()
                adapters.detach()
        if ranks.rank == 0:
            save_model(pipeline, run)
    return run


def save_model(pipeline, run: Run) -> None:
    """Write the folded pipeline as RUN/model, completely or not at all."""
    with no_bars(), new_folder(run.path / "model", replace=True) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)


def summary(losses: Tensor, density: float) -> str:
    """The means of some rows of losses (`step.LOSSES`) and the mask's density, for a person to read."""
    mean = dict(zip(LOSSES, losses.mean(0).tolist(), strict=True))
    return f"loss {mean['denoising']:.4f}, mask {density:.0%}, forgetting {mean['forgetting']:.2g}"


class Trainer:
    """One run on one device: what all tasks share, and what a task does before, in and after its steps.

    `captured` holds a step for each crop size that was met. `step` is the first of them; they differ in the buffers of latents
    and noise alone.
    """

    def __init__(self, pipeline, adapters, concepts: Sequence[Concept], config: StaminaConfig, options: TrainOptions,
                 ranks: Ranks | None = None, strategy: Strategy | None = None):
        self.ranks, self.strategy = ranks or Ranks(), strategy or Strategy()
        self.pipeline, self.adapters, self.concepts = pipeline, adapters, concepts
        self.config, self.options, self.device = config, options, pipeline.unet.device
        # raises where capture is asked for and impossible
        recorder(options.capture, self.device)
        self.backbone = Backbone(pipeline, config.token_vectors)
        self.diffusion = Diffusion(pipeline.scheduler, self.device, options.min_snr)
        self.loader = Loader(pipeline, self.backbone, options, self.diffusion.steps, self.ranks)
        adapters.tokens.check_order([concept.token for concept in concepts])
        for i, concept in enumerate(concepts):
            self.loader.check(concept, [before.token for before in concepts[:i]])
            adapters.tokens.check_start(concept.initializer_token)
        self.step: Step | None = None
        self.data: TaskData | None = None
        self.captured: dict[CropSize, Captured] = {}
        self.strategy.start(self)

    def lengthen(self, factor: int) -> None:
        """Make tasks `factor` times as long; schedules are stretched. The record keeps the options that were given."""
        self.options = dataclasses.replace(self.options, steps=factor * self.options.steps)

    def restore(self, run: Run) -> None:
        """Rebuild the weights after the run's finished tasks, from W_0 and the stored factors, and what the method keeps."""
        reopen.restore(self.adapters, run, [task["name"] for task in run.tasks()])
        self.strategy.restore(self, run)

    def learn(self, run: Run, shown: bool, on_task: Callable | None, on_step: Callable | None) -> None:
        """Learn all concepts that the run has not learned yet."""
        done, saved = len(run.tasks()), run.load_checkpoint()
        if saved is not None and saved.task != self.concepts[done].name:
            wanted = self.concepts[done].name
            raise InputError(f"the checkpoint is of {saved.task!r}, next is {wanted!r}; pass the same concepts")
        counts = [self.strategy.steps(self, task) for task in range(len(self.concepts))]
        with Progress("all concepts", sum(counts), sum(counts[:done]), shown) as progress:
            for task in range(done, len(self.concepts)):
                progress.begin(self.concepts[task].name, counts[task], saved.step if saved else 0, "encoding pictures")
                curve, seconds = self.steps(run, task, saved, progress, on_step)
                self.finish(run, task, curve, seconds)
                progress.end(f"learned {self.concepts[task].name} in {seconds:.1f} s")
                saved = None
                if on_task is not None and self.ranks.rank == 0:
                    on_task(self.pipeline, run, self.concepts[task])

    def steps(self, run: Run, task: int, saved: Checkpoint | None, progress: Progress, on_step: Callable | None):
        """Run all steps of one task, or those that `saved` leaves; return the curve, a row a step, and the seconds they took.

        Raises StaminaError once something is not finite.
        """
        start, concept, options = time.perf_counter(), self.concepts[task], self.options
        steps = self.strategy.steps(self, task)
        seed = derive_seed(options.seed, "task", task)
        data = self.data = self.begin(task, seed)
        first, density = 0, {}
        with self.strategy.learning(self, task), stepping(self.pipeline.unet, options), self.tables.held():
            for captured in self.captured.values():
                captured.begin_(derive_seed(seed, "gate"))
            if saved is not None:
                first = saved.step
                density, before = restore_(self.step, first, saved.tensors)
                start -= before
            read = first
            for i in range(first, steps):
                captured = self.fill_(data, i)
                if on_step is not None:
                    on_step(captured.step, task, i)
                captured()
                self.strategy.stepped(self)
                done = i + 1
                if done % options.read_every == 0 or done == steps:
                    self.check(concept)
                    density[i] = float(self.adapters.density())
                    progress.advance(done - read, summary(self.step.losses[read:done], density[i]))
                    read = done
                if options.save_every and done % options.save_every == 0 and done < steps:
                    self.check(concept)
                    if self.ranks.rank == 0:
                        run.save_checkpoint(concept.name, done, state(self.step, done, density, time.perf_counter() - start))
        return self.curve(density)[:steps], time.perf_counter() - start

    def begin(self, task: int, seed: int) -> TaskData:
        """Begin a task: fresh factors, a fresh token, its data, and a step for each of its crop sizes.

        Warns of a token that starts with little say in the picture.
        """
        concept = self.concepts[task]
        self.adapters.reset_(derive_seed(seed, "factors"))
        self.adapters.tokens.begin(concept.token, derive_seed(seed, "token"), concept.initializer_token)
        data = self.loader.load(concept, seed, self.strategy.pictures(self, task))
        if self.ranks.rank == 0:
            feed = next(iter(data.feeds.values()))
            share = share_of_a_word(self.backbone, self.adapters, self.diffusion, feed, derive_seed(seed, "start"))
            warn_of_little_say(share, concept)
        for size, feed in data.feeds.items():
            if size not in self.captured:
                self.captured[size] = self.captured_for(feed)
        return data

    def captured_for(self, feed: Feed) -> Captured:
        """A step for the latents of a feed, which serves all tasks."""
        latent, recorded_by = feed.bank.mean.shape[1:], recorder(self.options.capture, self.device)
        rows = len(self.concepts) * self.config.token_vectors
        if self.step is not None:
            return Captured(self.step.of_shape(latent), recorded_by, rows, self.tables)
        self.step = self.prepare(latent, [part.shape[1] for part in feed.ids])
        captured = Captured(self.step, recorded_by, rows)
        self.tables = captured.tables
        return captured

    def prepare(self, latent: tuple[int, int, int], lengths: list[int]) -> Step:
        """The first step, for latents [c, h, w] and prompts of so many tokens: made once, so that no address ever changes."""
        named = [*self.adapters.named_parameters(), *self.strategy.named_parameters()]
        named = [(name, p) for name, p in named if p.requires_grad]
        token = [(name, p) for name, p in named if name.startswith("token")]
        other = [(name, p) for name, p in named if not name.startswith("token")]
        rates = list(zip((Flat(other), Flat(token)), self.options.learning_rates(self.ranks.count), strict=True))
        self.trained = sum(p.numel() for flat, rate in rates if rate for p in flat.parameters)
        optimizer = make_optimizer(self.options.optimizer, rates, self.options.betas, self.options.weight_decay)
        parts, prior = self.options.accumulate, self.options.prior_weight
        buffers = Buffers.empty(self.options.batch * (2 if prior else 1), latent, lengths, self.device)
        weights = self.config.sparsity_weight, self.config.forgetting_weight
        of_rows = row_weights(self.options.batch, parts, prior, self.device)
        return Step(self.backbone, self.adapters, self.diffusion, optimizer, buffers, self.options.steps, weights,
                    self.options.gradient_clip, parts, of_rows, self.ranks, self.strategy.penalty)

    def fill_(self, data: TaskData, i: int) -> Captured:
        """Put in place whatever step i takes from outside; return the step that will run."""
        size = data.size_at(i)
        captured = self.captured[size]
        data.feeds[size].fill_(captured.step.buffers, i)
        self.step.buffers.tau.fill_(self.config.tau(i / max(1, self.options.steps - 1)))
        self.step.optimizer.set_rate_(self.options.rate(i))
        return captured

    def check(self, concept: Concept) -> None:
        """Raise StaminaError if a step met a number that is not finite, or if another rank has stopped."""
        # first, since waiting for the device may mean waiting for a rank that has stopped
        self.ranks.meet()
        found = self.step.trouble()
        if found is not None:
            raise StaminaError(
                f"{concept.name}: {found}; the task is rolled back and the earlier ones are kept: lower the learning rate "
                "and train again"
            )

    def curve(self, density: dict[int, float]) -> list[dict]:
        """A row for each step of the task: its losses, and the mask's density where it was read."""
        return [
            {"step": i, **dict(zip(LOSSES, row, strict=True))} | ({"density": density[i]} if i in density else {})
            for i, row in enumerate(self.step.losses.tolist())
        ]

    def finish(self, run: Run, task: int, curve: list[dict], seconds: float) -> None:
        """Fold the factors and the token, and store the task.

        Raises StaminaError if a parameter is not finite, or if the ranks do not have the same bits.
        """
        concept, adapters = self.concepts[task], self.adapters
        wrong = [name for flat in self.step.optimizer.flats for name in flat.non_finite()]
        if wrong:
            raise StaminaError(f"{concept.name}: {wrong[0]} is not finite after the last step; the task is rolled back")
        adapters.noise = None
        density = float(adapters.density())
        embeddings = adapters.fold_(concept.name)
        kept = self.strategy.end(self, task)
        if self.ranks.count > 1:
            weights = {f"stacks.{i}.weight": stack.weight for i, stack in enumerate(adapters.stacks)}
            bits = digest((weights | adapters.tasks[concept.name] | embeddings).items())
            self.ranks.agree(bits, f"folded other bits for {concept.name}, which is not stored: train again with --resume")
        if self.ranks.rank == 0:
            self.commit(run, concept, curve, seconds, density, embeddings, kept)
        self.ranks.meet()

    def commit(self, run: Run, concept: Concept, curve: list[dict], seconds: float, density: float, embeddings: dict,
               kept: dict[str, Tensor]) -> None:
        """Store a folded task, and what the method keeps of it."""
        info = {"name": concept.name, "token": concept.token, "initializer_token": concept.initializer_token,
                "prompt": concept.prompt, "seconds": seconds, "density": density, "steps": len(curve),
                "pictures": len(concept.images), "trained_parameters": self.trained}
        factors = self.adapters.tasks[concept.name]
        run.commit_task(concept.name, factors, embeddings, curve, info, folded_by=self.folded_by(), kept=kept)

    def folded_by(self) -> dict[str, str]:
        """The backend and the device that folded the weights: others may round elsewhere."""
        dtype = self.pipeline.unet.dtype
        gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if gpu else platform.machine()
        return {"backend": dispatch.choose(None, self.device, dtype), "device": f"{self.device.type} {name}"}
