"""Identification: in how many samples a classifier recognises the concept that they should show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from .classifier import Classifier

# a concept counts as named from this share of its samples on
NAMED = 0.5


def tensor_of(images: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures of one size as fp32 [n, 3, H, W] in [0, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def named_in(images: Sequence[Image.Image], name: str, classifier: Classifier) -> float:
    """The share of the pictures that the classifier gives this name."""
    return classifier.share(tensor_of(images), name)
