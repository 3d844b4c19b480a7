"""Aspect buckets: which crop sizes there are, and which picture goes to which of them."""

from __future__ import annotations

import math

from torch import Tensor

# (height, width) of a crop in pixels
CropSize = tuple[int, int]


def crop_sizes(side: int, multiple: int) -> list[CropSize]:
    """All crop sizes of at most side² pixels and nearly that many.

    Heights and widths are multiples of `multiple` between side/2 and 2 side. The square comes first; `side` must be a multiple
    of `multiple` itself.
    """
    found = []
    for short in range(side, (side - 1) // 2, -multiple):
        long = side**2 // short // multiple * multiple
        found += dict.fromkeys([(short, long), (long, short)])
    return found


def in_buckets(images: list[Tensor], allowed: list[CropSize]) -> dict[CropSize, list[int]]:
    """Sort pictures [3, H, W] by crop size: {size: indices of its pictures}.

    A picture goes to the size of the nearest aspect ratio, and to the first of several that are equally near.
    """
    found = {}
    for i, image in enumerate(images):
        height, width = image.shape[1:]
        nearest = min(allowed, key=lambda size: abs(math.log(height * size[1] / (width * size[0]))))
        found.setdefault(nearest, []).append(i)
    return found
