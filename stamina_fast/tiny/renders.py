"""Labelled renders of the small world: what a classifier learns to name kinds or identities from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .canvas import Canvas
from .identities import KINDS, Identity, backdrop, draw_identity, finish, identity, place_subject, view
from .places import paint_place


def views(subject: Identity, seeds: range, size: int = 32) -> Tensor:
    """Views of one identity, uint8 [n, 3, size, size]."""
    return torch.from_numpy(np.stack([view(subject, seed, size)[0] for seed in seeds])).permute(0, 3, 1, 2).contiguous()


def cut_half(images: Tensor, right: bool) -> Tensor:
    """The middle rows of the left or the right half of pictures uint8 [n, 3, H, W], enlarged to [n, 3, H, W] again.

    One of two subjects side by side, as the world draws them (`world.RELATIONS`), fills most of it.
    """
    height, width = images.shape[2:]
    rows, columns = slice(height // 4, height - height // 4), slice(width // 2, None) if right else slice(width // 2)
    larger = F.interpolate(images[:, :, rows, columns].float(), (height, width), mode="bilinear", align_corners=False)
    return larger.round().to(torch.uint8)


def beside(subject: Identity, seed: int, right: bool, size: int = 32) -> np.ndarray:
    """A picture `[size, size, 3]` uint8 of a subject on the left or the right of a stranger, as in the world's scenes."""
    rng = np.random.default_rng([seed, subject.seed, 3])
    c = Canvas(rng, 2 * size)
    paint_place(c, backdrop(rng)[0])
    stranger, jitter, scales = draw_identity(rng), rng.normal(0, 0.06, 4), rng.uniform(0.44, 0.54, 2)
    x = 0.5 if right else -0.5
    place_subject(c, stranger, rng, -x + jitter[2], jitter[3], scales[1])
    place_subject(c, subject, rng, x + jitter[0], jitter[1], scales[0])
    return finish(c, rng, size)


def halves(subject: Identity, seeds: range, size: int = 32) -> Tensor:
    """Halves of pictures with the subject and a stranger side by side: the subject's half, uint8 [n, 3, size, size].

    With even seeds it is on the left.
    """
    whole = [torch.from_numpy(beside(subject, seed, seed % 2 == 1, size)).permute(2, 0, 1)[None] for seed in seeds]
    return torch.cat([cut_half(picture, seed % 2 == 1) for picture, seed in zip(whole, seeds, strict=True)])


def of_kinds(each: int, first: int = 0, size: int = 32) -> tuple[Tensor, Tensor, list[str]]:
    """(pictures uint8, labels int64, names): `each` identities of every kind, one view of each, from seed `first` on."""
    pictures = [views(identity(first + i, kind), range(i, i + 1), size) for kind in KINDS for i in range(each)]
    return torch.cat(pictures), torch.arange(len(KINDS)).repeat_interleave(each), list(KINDS)


def of_identities(subjects: Mapping[str, Identity], each: int, first: int, others: int, other: str, size: int = 32,
                  draw: Callable[[Identity, range, int], Tensor] = views):
    """(pictures uint8, labels int64, names): `each` views of every subject from seed `first` on, and `others` of strangers.

    Every second stranger is of the kind of a subject, the rest are of any kind. `other` is the name of them all.
    draw: `views`, or `halves` for pictures that are halves of larger ones.
    """
    pictures = [draw(subject, range(first, first + each), size) for subject in subjects.values()]
    kinds = [subject.kind for subject in subjects.values()]
    strangers = [identity(2**32 + first + i, (kinds[i // 2 % len(kinds)] if i % 2 else None)) for i in range(others)]
    pictures += [draw(stranger, range(first + i, first + i + 1), size) for i, stranger in enumerate(strangers)]
    labels = torch.cat([torch.arange(len(subjects)).repeat_interleave(each), torch.full((others,), len(subjects))])
    return torch.cat(pictures), labels, [*subjects, other]
