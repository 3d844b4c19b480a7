"""The colours of the small world by name, RGB in [0, 1]."""

from __future__ import annotations

import numpy as np

COLOURS = {
    "red": (0.83, 0.14, 0.13),
    "orange": (0.95, 0.53, 0.12),
    "yellow": (0.95, 0.84, 0.20),
    "green": (0.20, 0.62, 0.24),
    "cyan": (0.20, 0.75, 0.78),
    "blue": (0.15, 0.32, 0.80),
    "purple": (0.52, 0.23, 0.68),
    "pink": (0.95, 0.55, 0.70),
    "brown": (0.47, 0.29, 0.15),
    "white": (0.94, 0.94, 0.92),
    "black": (0.10, 0.10, 0.12),
    "gray": (0.52, 0.53, 0.55),
}
DARK, LIGHT, GLASS = (0.08, 0.08, 0.10), (0.96, 0.96, 0.94), (0.62, 0.80, 0.90)


def contrast(colour: str) -> str:
    """White on a dark colour, black on a light one."""
    return "white" if np.mean(COLOURS[colour]) < 0.6 else "black"


def second_colour(rng: np.random.Generator, *taken: str) -> str:
    """A colour that is none of those taken."""
    others = [name for name in COLOURS if name not in taken]
    return others[rng.integers(len(others))]
