"""What a task trains on: its pictures as latents, its prompts as ids, and from them the batch of every step.

`Loader` is made once a run and loads one `TaskData` a task. A `TaskData` holds one `Feed` for each crop size that the pictures
of the concept have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..io.concepts import Concept
from ..io.images import load_image
from ..pipeline.load import resolution_of
from ..seeds import derive_seed
from .backbone import Backbone
from .buckets import CropSize, crop_sizes, in_buckets
from .latents import LatentBank, cached, encode, variants
from .options import TrainOptions
from .ranks import Ranks, digest
from .step import Buffers


class Drawn(NamedTuple):
    """Pictures besides the concept's own, of which each row of a batch shows one with probability `share`.

    images  [3, H, W] each, uint8 or floats in [-1, 1]
    texts   a prompt for each
    cut     whether they are cut as the concept's pictures are; otherwise the whole picture is one variant
    """

    images: list[Tensor]
    texts: list[str]
    share: float
    cut: bool = False


class Loader:
    """Loads the data of a task: what does not change from task to task.

    Raises InputError for a resolution that the model cannot train at. `timesteps` is the length of the noise schedule.
    """

    def __init__(self, pipeline, backbone: Backbone, options: TrainOptions, timesteps: int, ranks: Ranks):
        self.vae, self.backbone, self.options, self.timesteps, self.ranks = pipeline.vae, backbone, options, timesteps, ranks
        self.side = side = options.resolution or resolution_of(pipeline)
        levels = len(pipeline.unet.config.block_out_channels)
        multiple = max(2 ** (levels - 1), 8 if options.aspect_buckets else 1) * pipeline.vae_scale_factor
        if side % multiple:
            more = " with aspect_buckets" if options.aspect_buckets else ""
            raise InputError(f"resolution must be a multiple of {multiple} for this model{more}, got {side}; pass one")
        self.sizes = crop_sizes(side, multiple) if options.aspect_buckets else [(side, side)]
        self.vae_digest: str | None = None

    def check(self, concept: Concept, earlier: Sequence[str] = ()) -> None:
        """Raise InputError for a concept whose prompts the model cannot read, or whose class pictures are missing.

        earlier: the tokens of earlier concepts.
        """
        self.backbone.check_prompts(list(concept.texts), concept.token, earlier)
        if not self.options.prior_weight:
            return
        if not concept.class_images:
            raise InputError(
                f"prior_weight needs class pictures, {concept.name!r} has none; fill its class_data_dir and give its "
                "class_prompt in concepts_list.json, or leave prior_weight out"
            )
        self.backbone.check_prompts([concept.class_prompt], concept.token, earlier)

    def load(self, concept: Concept, seed: int, drawn: Drawn | None = None) -> TaskData:
        """Decode the concept's pictures, each once, and encode their crops. The pictures are freed when this returns.

        drawn  pictures to mix in, at every crop size

        Raises InputError for a picture that cannot be decoded.
        """
        options, feeds = self.options, {}
        images = [load_image(path) for path in concept.images]
        class_images = [load_image(path) for path in concept.class_images] if options.prior_weight else []
        cut = options.crops, options.crop_scale, options.flip, derive_seed(seed, "crops")
        for size, chosen in in_buckets(images, self.sizes).items():
            bank, texts = self._bank([images[i] for i in chosen], size, *cut), [concept.texts[i] for i in chosen]
            learned = len(bank)
            if drawn:
                how = cut if drawn.cut else (1, 1.0, False, 0)
                bank += encode(self.vae, *variants(drawn.images, size, *how), batch=options.batch)
                texts += drawn.texts
            others = len(bank) - learned
            if class_images:
                # at every crop size, since class pictures are in every batch
                bank += self._bank(class_images, size, 1, 1.0, False, 0)
                texts += [concept.class_prompt] * len(class_images)
            ids = self.backbone.tokenise(texts)
            feeds[size] = Feed(bank, ids, size, self.timesteps, derive_seed(seed, "feed"), self.ranks, len(class_images),
                               others, drawn.share if drawn else 0.0)
        return TaskData(feeds, seed)

    def _bank(self, images: list[Tensor], *cut) -> LatentBank:
        """The latents of pictures, cut as `cut` says (see `variants`), from the cache where there is one."""
        batch, folder = self.options.batch, self.options.cache_latents

        def make() -> LatentBank:
            return encode(self.vae, *variants(images, *cut), batch=batch)

        if folder is None:
            return make()
        if self.vae_digest is None:
            self.vae_digest = digest(self.vae.state_dict().items())
        pixels = digest((str(i), image) for i, image in enumerate(images))
        return cached(Path(folder), (self.vae_digest, pixels, cut, batch), self.vae, make, write=self.ranks.rank == 0)


class TaskData:
    """The feeds of one task, by crop size. All pictures of a batch have the same size.

    A size comes as often as it has variants of the concept's pictures, so that each variant is as likely as without buckets.
    """

    def __init__(self, feeds: dict[CropSize, Feed], seed: int):
        self.feeds, self.seed = feeds, seed
        self.weights = torch.tensor([float(feed.learned) for feed in feeds.values()])

    def size_at(self, step: int) -> CropSize:
        """The crop size of a step's batch, a function of (seed, task, step): the same on every rank."""
        draw = torch.Generator().manual_seed(derive_seed(self.seed, "bucket", step))
        return list(self.feeds)[int(torch.multinomial(self.weights, 1, generator=draw))]


class Feed:
    """Draws the batch of any step of a task, as a function of (seed, task, step) alone.

    bank       the variants to draw from; the last ones show `drawn` others, then the `prior` class pictures, one each
    ids        prompts of the pictures, [pictures, length] int64 for each text encoder
    size       what the variants were cut to, in pixels: (height, width), or the side of a square
    timesteps  length of the noise schedule
    ranks      their batches, one behind the other, are the batch that one process of that size would draw

    With class pictures, every second row of a batch shows one of them. Of the other rows, each shows one of the `drawn`
    variants with probability `share`: at random, so that no part of the noise schedule is theirs.
    """

    def __init__(self, bank: LatentBank, ids: list[Tensor], size: int | CropSize, timesteps: int, seed: int,
                 ranks: Ranks | None = None, prior: int = 0, drawn: int = 0, share: float = 0.0):
        self.prior, self.drawn, self.share, self.ranks = prior, drawn, share, ranks or Ranks()
        self.learned = len(bank) - prior - drawn
        self.bank, self.ids = bank, [part.to(bank.mean.device)[bank.picture] for part in ids]
        self.timesteps, self.seed = timesteps, seed
        self.draw = torch.Generator(device=bank.mean.device)
        target = torch.tensor(size, device=bank.mean.device).expand(len(bank), 2)
        self.frames = torch.cat([bank.frames, target], 1)

    def fill_(self, to: Buffers, step: int) -> None:
        """Fill the buffers for a step: random variants, their prompts, samples of their posteriors, noise, and timesteps.

        Of b rows, each takes its timestep from another b-th part of the schedule.
        """
        draw, device = self.draw.manual_seed(derive_seed(self.seed, "batch", step)), to.t.device
        b, rows = self.ranks.rows(len(to.t))
        shape = (b, *to.latents.shape[1:])
        index = torch.randint(self.learned, (b,), generator=draw, device=device)
        if self.drawn:
            others = self.learned + torch.randint(self.drawn, (b,), generator=draw, device=device)
            index = torch.where(torch.rand(b, generator=draw, device=device) < self.share, others, index)
        if self.prior:
            index[1::2] = len(self.bank) - self.prior + torch.randint(self.prior, (b // 2,), generator=draw, device=device)
        index = index[rows]
        to.latents.copy_(self.bank.draw(index, torch.randn(shape, generator=draw, device=device)[rows]))
        to.noise.copy_(torch.randn(shape, generator=draw, device=device)[rows])
        part = (torch.arange(b, device=device) + torch.rand(b, generator=draw, device=device)) / b
        to.t.copy_((part[rows] * self.timesteps).long().clamp(max=self.timesteps - 1))
        to.frames.copy_(self.frames[index])
        for buffer, ids in zip(to.ids, self.ids, strict=True):
            buffer.copy_(ids[index])


def row_weights(batch: int, parts: int, prior_weight: float, device: torch.device) -> Tensor | None:
    """The weight of each row of a part in the mean loss of that part, fp32 [rows]; None where every weight is 1.

    The batch is split into `parts`. With `prior_weight`, every second row is a class picture.
    """
    if not prior_weight:
        return torch.full((batch // parts,), 1 / parts, device=device) if parts > 1 else None
    return torch.tensor([2 / parts, 2 * prior_weight / parts], device=device).repeat(batch // parts)
