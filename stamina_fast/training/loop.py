"""`train`: attach once, then for every concept fresh factors, N steps, fold, store; at the end a plain pipeline."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import reopen
from ..adapter.attach import attach
from ..adapter.config import StaminaConfig
from ..errors import InputError, StaminaError
from ..io.concepts import Concept, load_concepts
from ..io.files import new_folder, read_bytes, sha256
from ..io.images import load_image
from ..io.run import Checkpoint, Run
from ..ops import dispatch
from ..pipeline.load import fingerprint, frozen, load_pipeline, no_bars, resolution_of
from ..seeds import derive_seed
from . import methods
from .attention import fastest_kernel
from .backbone import Backbone
from .buckets import Buckets, Shape, in_buckets, shapes
from .capture import Captured, recorder
from .checkpoint import restore_, state
from .diffusion import Diffusion
from .flat import Flat
from .latents import LatentBank, cached, encode, variants
from .optimizers import check_optimizer, make_optimizer
from .options import TrainOptions
from .progress import Reporter
from .ranks import Ranks, digest, together
from .record import check_same, digest_of
from .step import LOSSES, Buffers, Feed, Step
from .unet import prepared, stepping


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

    Several processes that torchrun or accelerate launch has started train one model together (`ranks`): options.batch pictures
    each, one gradient, the same bits. Rank 0 writes the RUN folder, which all must see, shows progress and calls on_task.

    Everything random is a function of (seed, task, step), so a run that is killed and resumed ends in the same bits. Raises
    StaminaError in one line; a concept whose numbers stop being finite is rolled back, and the concepts before it are kept.
    """
    config, options = settings(method, config or StaminaConfig(), options or TrainOptions(), changes)
    check_optimizer(options.optimizer)
    with together() as ranks:
        concepts = load_concepts(Path(concepts)) if isinstance(concepts, str | Path) else list(concepts)
        if not concepts:
            raise InputError("there are no concepts to learn; give at least one")
        pictures = [[load_image(path) for path in concept.images] for concept in concepts]
        named = isinstance(model, str | Path)
        pipeline = load_pipeline(model, ranks.device(device) if named or device is not None else None, dtype)
        record = {
            "method": method, "model": str(model) if named else type(model).__name__, "processes": ranks.count,
            "dtype": str(pipeline.unet.dtype).removeprefix("torch."), "fingerprint": fingerprint(pipeline),
            "stamina": config.to_dict(), "train": options.as_dict(),
            "concepts": [describe(*both, options.prior_weight > 0) for both in zip(concepts, pictures, strict=True)],
        }
        if options.attention == "measured":
            record["measured"] = {"attention": attention_of(Path(output), resume, pipeline, options, ranks)}
            options = dataclasses.replace(options, **record["measured"])
        ranks.connect(pipeline.unet.device)
        with frozen(pipeline), prepared(pipeline.unet, options):
            adapters = attach(pipeline, config)
            try:
                # everything that can be refused is refused before a file is written
                trainer = Trainer(pipeline, adapters, concepts, config, options, ranks)
                run = open_run(Path(output), record, resume, ranks)
                trainer.restore(run)
                trainer.learn(run, pictures, progress and ranks.rank == 0, on_task)
            finally:
                adapters.detach()
        if ranks.rank == 0:
            save_model(pipeline, run)
    return run


def attention_of(output: Path, resume: bool, pipeline, options: TrainOptions, ranks: Ranks) -> str:
    """The kernel that "measured" stands for: the fastest where rank 0 is, or that of the run in `output` which goes on."""
    if ranks.rank:
        return ranks.meet()[0]
    resumed = resume and (output / "manifest.json").is_file()
    found = Run.open(output).config.get("measured", {}).get("attention") if resumed else None
    if found is None:
        rows = options.batch // options.accumulate * (2 if options.prior_weight else 1)
        side = (options.resolution or resolution_of(pipeline)) // pipeline.vae_scale_factor
        found = fastest_kernel(pipeline.unet, rows, side, pipeline.tokenizer.model_max_length)
    return ranks.meet(found)[0]


def open_run(output: Path, record: dict, resume: bool, ranks: Ranks) -> Run:
    """The RUN folder, made by rank 0 and read by all. Raises InputError where it was started with anything else."""
    ranks.agree(sha256(repr(record).encode()), "was started with other options, pictures or another model")
    run = Run.create(output, record, resume=resume) if ranks.rank == 0 else None
    ranks.meet()
    run = run or Run.open(output)
    ranks.agree(sha256(read_bytes(output / "manifest.json")), "sees another RUN folder")
    # a run without the word is older than several processes
    was = {"processes": 1} | run.config
    if was["processes"] != record["processes"]:
        raise InputError(
            f"cannot resume: the run was started with {was['processes']} processes, is {record['processes']} now, and would "
            f"end in other bits; start {was['processes']}, or choose another output folder"
        )
    check_same(was, record)
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


def check_prior(concept: Concept) -> None:
    if not concept.class_images:
        raise InputError(
            f"prior_weight needs class pictures, {concept.name!r} has none; fill its class_data_dir and give its class_prompt "
            "in concepts_list.json, or leave prior_weight out"
        )


def describe(concept: Concept, images: list[torch.Tensor], prior: bool) -> dict:
    """What config.yaml says of a concept: its words, where its pictures are, and the hash of their pixels."""
    said = {"name": concept.name, "token": concept.token, "prompt": concept.prompt, "class_prompt": concept.class_prompt,
            "texts": list(concept.texts), "folder": str(concept.images[0].resolve().parent), "pictures": digest_of(images)}
    return said | ({"class_pictures": digest_of(map(load_image, concept.class_images))} if prior else {})


class Trainer:
    """One run on one device: the fixed buffers, the step over them, and what a task does before and after its steps.

    `step` is that of the first shape that crops have, and `captured` holds one for each shape.
    """

    def __init__(self, pipeline, adapters, concepts: Sequence[Concept], config: StaminaConfig, options: TrainOptions,
                 ranks: Ranks | None = None):
        self.ranks = ranks or Ranks()
        self.pipeline, self.adapters, self.concepts = pipeline, adapters, concepts
        self.config, self.options, self.step, self.tables, self.vae = config, options, None, None, None
        self.captured: dict[Shape, Captured] = {}
        self.device = pipeline.unet.device
        # refuses what cannot be
        recorder(options.capture, self.device)
        self.size = options.resolution or resolution_of(pipeline)
        levels = len(pipeline.unet.config.block_out_channels)
        factor = max(2 ** (levels - 1), 8 if options.aspect_buckets else 1) * pipeline.vae_scale_factor
        if self.size % factor:
            more = " with aspect_buckets" if options.aspect_buckets else ""
            raise InputError(f"resolution must be a multiple of {factor} for this model{more}, got {self.size}")
        self.shapes = shapes(self.size, factor) if options.aspect_buckets else [(self.size, self.size)]
        self.backbone = Backbone(pipeline)
        self.diffusion = Diffusion(pipeline.scheduler, self.device, options.min_snr)
        for concept in concepts:
            self.backbone.check_prompts(list(concept.texts), concept.token)
            if options.prior_weight:
                check_prior(concept)
                self.backbone.check_prompts([concept.class_prompt], concept.token)

    def restore(self, run: Run) -> None:
        """Bring back the finished tasks of the run, from W_0 and the stored factors."""
        reopen.restore(self.adapters, run, [task["name"] for task in run.tasks()])

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
                if on_task is not None and self.ranks.rank == 0:
                    on_task(self.pipeline, run, self.concepts[task])

    def steps(self, run: Run, task: int, images: list[torch.Tensor], reporter: Reporter, saved: Checkpoint | None):
        """All steps of one task, or those that `saved` leaves; the curve, a row a step, and the seconds they took.

        Raises StaminaError once something is not finite.
        """
        start, concept, options = time.perf_counter(), self.concepts[task], self.options
        seed = derive_seed(options.seed, "task", task)
        buckets = self.begin(concept, images, seed)
        density, first = {}, 0
        with stepping(self.pipeline.unet, options), self.tables.held():
            for captured in self.captured.values():
                captured.begin_(derive_seed(seed, "gate"))
            if saved is not None:
                first = saved.step
                density, before = restore_(self.step, first, saved.tensors)
                start -= before
            read = first
            for i in range(first, options.steps):
                shape = buckets.fill_(i)
                self.step.buffers.tau.fill_(self.config.tau(i / max(1, options.steps - 1)))
                self.step.optimizer.set_rate_(options.rate(i))
                self.captured[shape]()
                done = i + 1
                if done % options.read_every == 0 or done == options.steps:
                    self.check(concept)
                    density[i] = float(self.adapters.density())
                    means = self.step.losses[read:done].mean(0).tolist()
                    reporter.update(task, done, dict(zip(LOSSES, means, strict=True)), density[i])
                    read = done
                if options.save_every and done % options.save_every == 0 and done < options.steps:
                    self.check(concept)
                    if self.ranks.rank == 0:
                        run.save_checkpoint(concept.name, done, state(self.step, done, density, time.perf_counter() - start))
        rows = self.step.losses.tolist()
        curve = [
            {"step": i, **dict(zip(LOSSES, row, strict=True))} | ({"density": density[i]} if i in density else {})
            for i, row in enumerate(rows)
        ]
        return curve, time.perf_counter() - start

    def begin(self, concept: Concept, images: list[torch.Tensor], seed: int) -> Buckets:
        """A fresh task: factors, token, and what feeds its steps."""
        options = self.options
        self.adapters.reset_(derive_seed(seed, "factors"))
        self.adapters.tokens.begin(concept.token, derive_seed(seed, "token"))
        cut, feeds = (options.crops, options.crop_scale, options.flip, derive_seed(seed, "crops")), {}
        others = [load_image(path) for path in concept.class_images] if options.prior_weight else []
        for shape, chosen in in_buckets(images, self.shapes).items():
            bank, texts = self.bank([images[i] for i in chosen], shape, *cut), [concept.texts[i] for i in chosen]
            if others:
                # in every shape, as each batch holds some of them
                bank, texts = bank + self.bank(others, shape, 1, 1.0, False, 0), [*texts, *[concept.class_prompt] * len(others)]
            ids = self.backbone.tokenise(texts)
            step = self.step_of(shape, bank.mean.shape[1:], [part.shape[1] for part in ids])
            feeds[shape] = Feed(step.buffers, bank, ids, shape, self.diffusion.steps, derive_seed(seed, "feed"), self.ranks,
                                len(others))
        return Buckets(feeds, seed)

    def step_of(self, shape: Shape, latent: tuple[int, int, int], lengths: list[int]) -> Step:
        """The step for crops of this shape, whose latents are [c, h, w]: made once for all tasks."""
        if shape not in self.captured:
            recorded_by = recorder(self.options.capture, self.device)
            if self.step is None:
                self.step = self.prepare(latent, lengths)
                captured = Captured(self.step, recorded_by, len(self.concepts))
                self.tables = captured.tables
            else:
                captured = Captured(self.step.of_shape(latent), recorded_by, len(self.concepts), self.tables)
            self.captured[shape] = captured
        return self.captured[shape].step

    def bank(self, images: list[torch.Tensor], *cut) -> LatentBank:
        """The latents of pictures in variants that `cut` describes (its shape first), from the cache where there is one."""
        vae, batch, folder = self.pipeline.vae, self.options.batch, self.options.cache_latents

        def make() -> LatentBank:
            return encode(vae, *variants(images, *cut), batch=batch)

        if folder is None:
            return make()
        if self.vae is None:
            self.vae = digest(vae.state_dict().items())
        key = self.vae, digest_of(images), cut, batch
        return cached(Path(folder), key, vae, make, write=self.ranks.rank == 0)

    def prepare(self, shape: tuple[int, int, int], lengths: list[int]) -> Step:
        """The buffers and the step, once for all tasks, so that no address changes between them."""
        named = [(name, p) for name, p in self.adapters.named_parameters() if p.requires_grad]
        token = [(name, p) for name, p in named if name.startswith("token")]
        other = [(name, p) for name, p in named if not name.startswith("token")]
        rates = list(zip((Flat(other), Flat(token)), self.options.learning_rates(self.ranks.count), strict=True))
        optimizer = make_optimizer(self.options.optimizer, rates, self.options.betas, self.options.weight_decay)
        parts, prior = self.options.accumulate, self.options.prior_weight
        rows = self.options.batch * (2 if prior else 1)
        buffers = Buffers.empty(rows, shape, lengths, self.device)
        weights = self.config.sparsity_weight, self.config.forgetting_weight
        share = Feed.share(self.options.batch, parts, prior, self.device)
        return Step(self.backbone, self.adapters, self.diffusion, optimizer, buffers, self.options.steps, weights,
                    self.options.gradient_clip, parts, share, self.ranks)

    def check(self, concept: Concept) -> None:
        # before the device is waited for, whose step may be waiting for a rank that has stopped
        self.ranks.meet()
        found = self.step.trouble()
        if found is not None:
            raise StaminaError(
                f"{concept.name}: {found}; the task is rolled back and the earlier ones are kept: lower the learning rate "
                "and train again"
            )

    def finish(self, run: Run, task: int, curve: list[dict], seconds: float) -> None:
        """Fold the factors and the token, if all of them are finite, and store the task, if all ranks have the same bits."""
        concept, adapters = self.concepts[task], self.adapters
        wrong = [name for flat in self.step.optimizer.flats for name in flat.non_finite()]
        if wrong:
            raise StaminaError(f"{concept.name}: {wrong[0]} is not finite after the last step; the task is rolled back")
        adapters.noise = None
        density = float(adapters.density())
        embeddings = adapters.fold_(concept.name)
        if self.ranks.count > 1:
            weights = {f"stacks.{i}.weight": stack.weight for i, stack in enumerate(adapters.stacks)}
            bits = digest((weights | adapters.tasks[concept.name] | embeddings).items())
            self.ranks.agree(bits, f"folded other bits for {concept.name}, which is not stored: train again with --resume")
        if self.ranks.rank == 0:
            self.commit(run, concept, curve, seconds, density, embeddings)
        self.ranks.meet()

    def commit(self, run: Run, concept: Concept, curve: list[dict], seconds: float, density: float, embeddings: dict) -> None:
        """Store a folded task."""
        info = {"name": concept.name, "token": concept.token, "prompt": concept.prompt, "seconds": seconds, "density": density,
                "steps": self.options.steps, "pictures": len(concept.images)}
        run.commit_task(concept.name, self.adapters.tasks[concept.name], embeddings, curve, info, folded_by=self.folded_by())

    def folded_by(self) -> dict[str, str]:
        """Whose bits the folded weights are."""
        dtype = self.pipeline.unet.dtype
        gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if gpu else platform.machine()
        return {"backend": dispatch.choose(None, self.device, dtype), "device": f"{self.device.type} {name}"}
