"""Who names the pictures: a classifier trained on renders, or the nearest of some pictures in a fixed encoder's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from ..evaluate.classifier import OTHER, Classifier, train_classifier
from ..evaluate.features import Encoder
from ..evaluate.naming import tensor_of
from ..tiny.identities import Identity
from ..tiny.renders import cut_half, halves, of_identities, of_kinds, views
from .plan import Renders

# seeds of views: those that a classifier is trained on, and those that its own accuracy is measured on
FIRST_TRAINED, FIRST_HELD_OUT, HELD_OUT = 2_000, 1_000_000, 16


class ByClassifier:
    """Names pictures by a classifier of small pictures, which knows strangers too."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier

    def name(self, images: Sequence[Image.Image]) -> list[str]:
        return self.classifier.name(tensor_of(images))


class ByNearest:
    """Names pictures by the nearest centroid of held-out pictures in features; it knows no strangers."""

    def __init__(self, encode: Encoder, held_out: Mapping[str, Sequence[Image.Image]]):
        self.encode, self.names = encode, list(held_out)
        self.centroids = torch.stack([encode(images).mean(0) for images in held_out.values()])

    def name(self, images: Sequence[Image.Image]) -> list[str]:
        return [self.names[i] for i in torch.cdist(self.encode(images), self.centroids).argmin(1).tolist()]


def half(images: Sequence[Image.Image], right: bool) -> list[Image.Image]:
    """The middle rows of the left or the right half of pictures of one size, enlarged (`renders.cut_half`)."""
    cut = cut_half((tensor_of(images) * 255).round().to(torch.uint8), right)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in cut]


def of_subjects(subjects: Mapping[str, Identity], size: int, renders: Renders) -> tuple[Classifier, dict]:
    """A classifier of the subjects and of strangers, seen whole and as halves of pictures with two; and its own accuracy.

    The accuracy is that on renders it was not trained on, whole and halves apart: the mean over the subjects, the least of
    them by name, and that on strangers.
    """
    # a third of every batch are strangers: with fewer, most strangers would get the name of a subject of their kind
    many = max(1, len(subjects) // 2)
    parts = [of_identities(subjects, renders.each, FIRST_TRAINED, max(6, many) * renders.each, OTHER, size, draw)
             for draw in (views, halves)]
    names = parts[0][2]
    classifier = train_classifier(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), names,
                                  steps=renders.steps, shares=[1.0] * len(subjects) + [float(many)])
    measured = {}
    for what, draw in (("whole", views), ("halves", halves)):
        pictures, labels, _ = of_identities(subjects, HELD_OUT, FIRST_HELD_OUT, 4 * HELD_OUT, OTHER, size, draw)
        measured[what] = accuracy(classifier, pictures, labels)
    return classifier, measured


def of_words(size: int, renders: Renders) -> tuple[Classifier, dict]:
    """A classifier of the kinds that captions name, and its own accuracy on identities that it was not trained on."""
    pictures, labels, names = of_kinds(renders.each, 2**33, size)
    classifier = train_classifier(pictures, labels, names, steps=renders.steps)
    pictures, labels, _ = of_kinds(HELD_OUT, 2**34, size)
    return classifier, accuracy(classifier, pictures, labels)


def accuracy(classifier: Classifier, pictures: Tensor, labels: Tensor) -> dict:
    """The share of pictures uint8 `[n, 3, H, W]` that get the name of their label: mean over the names, and for each name."""
    found = classifier.probabilities(pictures.float() / 255).argmax(1)
    each = {name: (found[labels == i] == i).double().mean().item() for i, name in enumerate(classifier.names)}
    known = {name: value for name, value in each.items() if name != OTHER}
    least = min(known, key=known.get)
    return {"mean": sum(known.values()) / len(known), "least": [least, known[least]]} | {
        name: value for name, value in each.items() if name == OTHER}
