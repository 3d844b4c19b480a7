"""Labelled renders of the small world: what a classifier learns to name kinds or identities from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .identities import KINDS, Identity, identity, view


def views(subject: Identity, seeds: range, size: int = 32) -> Tensor:
    """Views of one identity, uint8 [n, 3, size, size]."""
    return torch.from_numpy(np.stack([view(subject, seed, size)[0] for seed in seeds])).permute(0, 3, 1, 2).contiguous()


def of_kinds(each: int, first: int = 0, size: int = 32) -> tuple[Tensor, Tensor, list[str]]:
    """(pictures uint8, labels int64, names): `each` identities of every kind, one view of each, from seed `first` on."""
    pictures = [views(identity(first + i, kind), range(i, i + 1), size) for kind in KINDS for i in range(each)]
    return torch.cat(pictures), torch.arange(len(KINDS)).repeat_interleave(each), list(KINDS)


def of_identities(subjects: Mapping[str, Identity], each: int, first: int, others: int, other: str, size: int = 32):
    """(pictures uint8, labels int64, names): `each` views of every subject from seed `first` on, and `others` of strangers.

    Every second stranger is of the kind of a subject, the rest are of any kind. `other` is the name of them all.
    """
    pictures = [views(subject, range(first, first + each), size) for subject in subjects.values()]
    kinds = [subject.kind for subject in subjects.values()]
    strangers = [identity(2**32 + first + i, (kinds[i // 2 % len(kinds)] if i % 2 else None)) for i in range(others)]
    pictures += [views(stranger, range(first + i, first + i + 1), size) for i, stranger in enumerate(strangers)]
    labels = torch.cat([torch.arange(len(subjects)).repeat_interleave(each), torch.full((others,), len(subjects))])
    return torch.cat(pictures), labels, [*subjects, other]
