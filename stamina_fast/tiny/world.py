"""A procedural captioned world: the pictures that the small model is pre-trained on.

A scene is a place, one or two objects with a colour, a texture, a size and a position, and a caption with a small
grammar. Everything is drawn from signed distance functions in numpy, so a scene is a pure function of its seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Canvas, value_noise
from .objects import DARK, LIGHT, OBJECTS

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
TEXTURES = ("plain", "striped", "spotted", "checkered", "furry", "shiny")
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


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    texture: str
    x: float
    y: float
    scale: float


def draw_thing(c: Canvas, thing: Thing):
    rng = c.rng
    angle = rng.normal(0, 0.10) if thing.kind not in ("ball", "ring", "star", "fish", "rocket") else rng.normal(0, 0.3)
    c.place_object(thing.x, thing.y, thing.scale, angle, rng.random() < 0.5)
    others = [v for k, v in COLOURS.items() if k != thing.colour]
    second = np.asarray(others[rng.integers(len(others))])
    if thing.texture in ("striped", "spotted", "checkered") or rng.random() < 0.5:
        second = np.asarray(LIGHT if np.mean(COLOURS[thing.colour]) < 0.6 else DARK)
    c.dress(COLOURS[thing.colour], second, thing.texture)
    if c.shading:
        c.paint(c.ellipse(0, 0.95, 0.8, 0.18), (0.05, 0.05, 0.05), 0.25)
    OBJECTS[thing.kind](c)


def phrase(rng, thing: Thing, place_size: bool) -> str:
    """'a small striped red cat'. Each attribute is named most of the time, so that a bare noun is learned too."""
    words = []
    if place_size and rng.random() < 0.7:
        words.append("small" if thing.scale < 0.42 else "big" if thing.scale > 0.75 else "")
    if thing.texture != "plain" and rng.random() < 0.8:
        words.append(thing.texture)
    if rng.random() < 0.8:
        words.append(thing.colour)
    words = [w for w in words if w] + [thing.kind]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def scene(seed: int, size: int = 32) -> tuple[np.ndarray, str]:
    """The picture `[size, size, 3]` uint8 and the caption of one seed."""
    rng = np.random.default_rng(seed)
    c = Canvas(rng, 2 * size)
    drawing = rng.random() < 0.15
    c.shading = 0.0 if drawing else 1.0
    backdrop = rng.random() < 0.35
    place = list(COLOURS)[rng.integers(len(COLOURS))] if backdrop else list(PLACES)[rng.integers(len(PLACES))]
    paint_place(c, place if backdrop else PLACES[place])
    where = f"on a {place} background" if backdrop else place
    if backdrop and place == "orange":
        where = "on an orange background"

    def thing(x, y, scale):
        kind = list(OBJECTS)[rng.integers(len(OBJECTS))]
        texture = "plain" if rng.random() < 0.5 else TEXTURES[rng.integers(len(TEXTURES))]
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        if backdrop and colour == place:
            colour = "white" if place != "white" else "red"
        return Thing(kind, colour, texture, x, y, scale)

    layout = rng.random()
    jitter = rng.normal(0, 0.07, 4)
    opening = "a drawing of" if drawing else ("a photo of", "a picture of")[rng.integers(2)]
    if layout < 0.45:
        one = thing(jitter[0], jitter[1], rng.uniform(0.5, 0.9))
        text = phrase(rng, one, True)
        things = [one]
    elif layout < 0.70:
        # a close-up: the object fills the picture and is cut off by its edge
        one = thing(jitter[0] * 3, jitter[1] * 3, rng.uniform(1.0, 1.5))
        opening, text, things = "a close up of", phrase(rng, one, False), [one]
    elif layout < 0.83:
        side = rng.integers(4)
        dx, dy = ((-0.45, 0), (0.45, 0), (0, -0.45), (0, 0.45))[side]
        one = thing(dx + jitter[0], dy + jitter[1], rng.uniform(0.3, 0.45))
        things = [one]
        text = f"{phrase(rng, one, True)} {('on the left', 'on the right', 'at the top', 'at the bottom')[side]}"
    else:
        dx, dy, relation = ((-0.5, 0, "left of"), (0.5, 0, "right of"), (0, -0.5, "above"), (0, 0.5, "below"))[rng.integers(4)]
        one = thing(dx + jitter[0], dy + jitter[1], rng.uniform(0.36, 0.46))
        two = thing(-dx + jitter[2], -dy + jitter[3], rng.uniform(0.36, 0.46))
        text, things = f"{phrase(rng, one, False)} {relation} {phrase(rng, two, False)}", [one, two]
    for item in things:
        draw_thing(c, item)
    caption = f"{opening} {text}"
    if rng.random() < 0.85:
        caption += " " + where
    image = c.image.reshape(size, 2, size, 2, 3).mean((1, 3))
    if not drawing:
        # a camera's grain, exposure and white balance
        image = (image - 0.5) * rng.uniform(0.8, 1.1) + 0.5 + rng.normal(0, 0.03)
        image = image * (1 + rng.normal(0, 0.03, 3)) + rng.normal(0, 0.01, image.shape)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), caption


def vocabulary() -> list[str]:
    """Every word that a caption can hold."""
    grammar = "a an photo picture drawing close up of on in at by the left right top bottom above below background"
    words = [*grammar.split(), "small", "big", *list(COLOURS), *TEXTURES[1:], *list(OBJECTS), *" ".join(PLACES).split()]
    return sorted(set(words))
