"""What both demos share: how much they do, and on how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """How much a demo does: options of the trainer; samples for every measure, and steps of the sampler."""

    train: dict
    samples: int
    sampler_steps: int


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread until the block ends: the small model's operators are too small for several, which would wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
