"""The places of the small world: what fills a picture behind its subjects."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, value_noise
from .colours import COLOURS

PLACES = {
    "on grass": "grass",
    "in the sky": "sky",
    "on a beach": "beach",
    "in a forest": "forest",
    "on snow": "snow",
    "at night": "night",
    "in the water": "water",
    "on a table": "table",
    "by a wall": "wall",
    "in a room": "room",
}


def paint_place(c: Canvas, place: str):
    """Fill the canvas with a place, or with a backdrop of one colour when the place is a colour word."""
    rng, y = c.rng, c.gy
    noise = value_noise(rng, c.size, 5)[..., None] - 0.5
    fine = value_noise(rng, c.size, 18)[..., None] - 0.5
    horizon = rng.uniform(-0.35, 0.25)
    below = np.clip((y - horizon) / 0.06, 0, 1)[..., None]
    depth = ((y + 1) / 2)[..., None]

    def mix(top, bottom, roughness=0.15):
        c.image[:] = np.asarray(top) * (1 - below) + np.asarray(bottom) * below + fine * roughness * below

    if place == "grass":
        mix((0.62, 0.80, 0.94), (0.34, 0.58, 0.22), 0.3)
    elif place == "beach":
        mix((0.45, 0.72, 0.88), (0.90, 0.80, 0.58))
    elif place == "snow":
        mix((0.70, 0.78, 0.86), (0.93, 0.95, 0.97), 0.06)
    elif place == "water":
        wave = np.sin(y * 28 + 3 * np.sin(c.gx * 3 + rng.uniform(0, 6)))[..., None] * 0.07
        c.image[:] = np.asarray((0.16, 0.42, 0.62)) + wave + noise * 0.15
    elif place == "sky":
        c.image[:] = np.asarray((0.36, 0.60, 0.90)) + depth * 0.22
        cloud = np.clip(noise * 4, 0, 1)
        c.image += (0.96 - c.image) * cloud
    elif place == "night":
        c.image[:] = np.asarray((0.03, 0.04, 0.13)) + depth * 0.10
        c.image += (rng.random((c.size, c.size, 1)) > 0.988) * 0.8
        c.paint(c.ellipse(rng.choice((-0.7, 0.7)), -0.72, 0.16), (0.98, 0.96, 0.80))
    elif place == "forest":
        trunk = np.sin(c.gx * rng.uniform(7, 11) + rng.uniform(0, 6))[..., None]
        c.image[:] = np.asarray((0.10, 0.28, 0.13)) + noise * 0.3 + fine * 0.15
        c.image += (np.asarray((0.26, 0.17, 0.10)) - c.image) * (trunk > 0.75)
    elif place == "table":
        grain = np.sin(y * 20 + noise[..., 0] * 8)[..., None] * 0.06
        c.image[:] = np.asarray((0.58, 0.38, 0.22)) * rng.uniform(0.7, 1.2) + grain + noise * 0.12
    elif place == "wall":
        rows = np.floor((y + 1) * 5)
        joint = (((y + 1) * 5) % 1 < 0.16) | (((c.gx + 1) * 2.5 + rows % 2 * 0.5) % 1 < 0.08)
        c.image[:] = np.where(joint[..., None], 0.72, np.asarray((0.60, 0.27, 0.20)) + noise * 0.2)
    elif place == "room":
        wall = np.asarray(list(COLOURS.values())[rng.integers(len(COLOURS))]) * 0.4 + 0.45
        mix(wall, np.asarray((0.45, 0.33, 0.24)), 0.08)
    else:
        c.image[:] = np.asarray(COLOURS[place]) * (1 + 0.35 * (depth - 0.5) * rng.uniform(-1, 1)) + noise * 0.08
