"""Pictures of several aspect ratios: each in the shape nearest to its own, and every batch of one shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..seeds import derive_seed
from .step import Feed

# (height, width) in pixels
Shape = tuple[int, int]


def shapes(size: int, multiple: int) -> list[Shape]:
    """All shapes of at most size² pixels and nearly that many, with sides in multiples of `multiple`, from size/2 to 2 size.

    size: the side of the square among them, a multiple of `multiple` itself.
    """
    found = []
    for short in range(size, (size - 1) // 2, -multiple):
        long = size**2 // short // multiple * multiple
        found += dict.fromkeys([(short, long), (long, short)])
    return found


def in_buckets(images: list[Tensor], allowed: list[Shape]) -> dict[Shape, list[int]]:
    """The numbers of the pictures [3, H, W] that go into each shape: that of the nearest aspect ratio, the first of equals."""
    found = {}
    for i, image in enumerate(images):
        height, width = image.shape[1:]
        nearest = min(allowed, key=lambda shape: abs(math.log(height * shape[1] / (width * shape[0]))))
        found.setdefault(nearest, []).append(i)
    return found


class Buckets:
    """The feeds of one task, by shape. Of which shape the batch of a step is, (seed, task, step) say: on every rank the same.

    A shape comes as often as it has variants of the concept's pictures, so that each of them is as likely as without buckets.
    """

    def __init__(self, feeds: dict[Shape, Feed], seed: int):
        self.feeds, self.seed = feeds, seed
        self.weights = torch.tensor([float(feed.learned) for feed in feeds.values()])

    def fill_(self, step: int) -> Shape:
        """Fill the buffers of one shape for a step, and say which."""
        draw = torch.Generator().manual_seed(derive_seed(self.seed, "bucket", step))
        shape = list(self.feeds)[int(torch.multinomial(self.weights, 1, generator=draw))]
        self.feeds[shape].fill_(step)
        return shape
