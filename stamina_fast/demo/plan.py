"""What both demos share: how much they do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How much a demo does: options of the trainer; samples for every measure, and steps of the sampler."""

    train: dict
    samples: int
    sampler_steps: int
