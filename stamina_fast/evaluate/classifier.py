"""A small classifier that names pictures: trained on labelled renders, asked about samples.

A sample counts as its concept's when the classifier gives it that name. One name, OTHER, is for everything that is none of the
subjects, so that a picture of nothing in particular is not given the nearest name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FileError, InputError
from ..io.files import read_tensors, write_tensors

OTHER = "other"
WIDTHS = (32, 64, 128)


class Network(nn.Module):
    """Pictures [n, 3, H, W] in [0, 1] to logits [n, classes]: three stages of two 3 x 3 convolutions, each of half the size."""

    def __init__(self, classes: int):
        super().__init__()
        layers, before = [], 3
        for width in WIDTHS:
            for stride in (2, 1):
                layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
        self.features, self.head = nn.Sequential(*layers), nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images * 2 - 1).mean((2, 3)))


def disturb(images: Tensor, draw: torch.Generator) -> Tensor:
    """The pictures shifted, mirrored, blurred, dimmed, tinted and noisy by chance, as an autoencoder or a camera would do."""
    n, _, height, width = images.shape
    top, left = torch.randint(5, (2,), generator=draw).tolist()
    images = F.pad(images, (2, 2, 2, 2), mode="replicate")[..., top:top + height, left:left + width]
    mirror = torch.rand(n, 1, 1, 1, generator=draw) < 0.5
    images = torch.where(mirror, images.flip(3), images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, torch.rand(n, 1, 1, 1, generator=draw))
    gain, shift = torch.rand(n, 1, 1, 1, generator=draw) * 0.3 + 0.85, torch.randn(n, 3, 1, 1, generator=draw) * 0.03
    return (images - 0.5) * gain + 0.5 + shift + torch.randn(images.shape, generator=draw) * 0.02


def share(names: Sequence[str], wanted: str) -> float:
    """The share of the names that are `wanted`."""
    return sum(name == wanted for name in names) / len(names)


class Classifier:
    """Names pictures. names: the name of each class, in the order of its outputs."""

    def __init__(self, names: Sequence[str], network: Network):
        self.names, self.network = list(names), network.eval()

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """float64 [n, classes] of pictures [n, 3, H, W] in [0, 1]; rows sum to 1."""
        return torch.cat([self.network(part.float()).double().softmax(1) for part in images.split(256)])

    def name(self, images: Tensor) -> list[str]:
        """The likeliest name of each picture."""
        return [self.names[i] for i in self.probabilities(images).argmax(1).tolist()]

    def share(self, images: Tensor, name: str) -> float:
        """The share of the pictures that get this name."""
        return share(self.name(images), name)

    def save(self, path: str | Path) -> str:
        """Write names and weights as one safetensors file, atomically; return its SHA-256."""
        names = torch.tensor(list(json.dumps(self.names).encode()), dtype=torch.uint8)
        return write_tensors(Path(path), {"names": names, **self.network.state_dict()})

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """A classifier from the file that `save` wrote. Raises FileError for any other file."""
        tensors = read_tensors(Path(path))
        try:
            names = json.loads(bytes(tensors.pop("names").tolist()))
            network = Network(len(names))
            network.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileError(f"{str(path)!r} holds no classifier: {' '.join(str(error).split())[:200]}; remove it, so that it "
                            "is trained again") from error
        return cls(names, network)


def train_classifier(images: Tensor, labels: Tensor, names: Sequence[str], *, steps: int = 600, batch: int = 64,
                     rate: float = 3e-3, seed: int = 0, shares: Sequence[float] | None = None) -> Classifier:
    """Train on pictures uint8 [n, 3, H, W] with labels int64 [n], which index `names`; a function of the arguments alone.

    AdamW with a one-cycle rate. A batch has as many pictures of each class, on average, however many each has; or as many
    as `shares` says, a number above 0 for each name.
    Raises InputError for a name without pictures.
    """
    counts = torch.bincount(labels, minlength=len(names))
    if len(counts) != len(names) or not counts.all():
        empty = [name for name, count in zip(names, counts.tolist(), strict=False) if not count]
        raise InputError(f"a classifier needs pictures of every name, {', '.join(empty) or 'the labels'} has none; give some")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = Network(len(names)).train()
    wanted = torch.ones(len(names)) if shares is None else torch.tensor(shares)
    draw, weights = torch.Generator().manual_seed(seed), (wanted.double() / counts)[labels]
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        pick = torch.multinomial(weights, batch, replacement=True, generator=draw)
        loss = F.cross_entropy(network(disturb(images[pick].float() / 255, draw)), labels[pick], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Classifier(names, network)
