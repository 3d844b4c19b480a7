"""The things of the small world, each drawn in its own frame [-1, 1]², y downwards, in the coat of the canvas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Canvas
from .colours import COLOURS, DARK, GLASS, LIGHT, contrast, second_colour


def ball(c: Canvas):
    c.paint(c.ellipse(0, 0, 0.85))


def cube(c: Canvas):
    c.paint(c.box(0, 0, 0.72, 0.72, soft=0.05))
    c.paint(c.convex((-0.72, -0.72), (-0.42, -0.95), (0.98, -0.95), (0.72, -0.72)), c.second)
    c.paint(c.convex((0.72, -0.72), (0.98, -0.95), (0.98, 0.45), (0.72, 0.72)), c.second * 0.6)


def star(c: Canvas):
    angle = np.arctan2(c.x, -c.y)
    wave = np.abs((angle * 5 / (2 * np.pi)) % 1 - 0.5) * 2
    c.paint(np.hypot(c.x, c.y) - (0.38 + 0.6 * wave))


def heart(c: Canvas):
    c.paint(np.minimum(np.minimum(c.ellipse(-0.4, -0.3, 0.46), c.ellipse(0.4, -0.3, 0.46)),
                       c.convex((-0.82, -0.1), (0, -0.45), (0.82, -0.1), (0, 0.92))))


def cup(c: Canvas):
    c.paint(np.abs(c.ellipse(0.72, 0.05, 0.34, 0.36)) - 0.09)
    c.paint(c.convex((-0.75, -0.5), (0.75, -0.5), (0.52, 0.8), (-0.52, 0.8)))
    c.paint(c.ellipse(0, -0.5, 0.75, 0.24))
    c.paint(c.ellipse(0, -0.48, 0.62, 0.17), (0.30, 0.17, 0.08))


def house(c: Canvas):
    c.paint(c.box(0, 0.35, 0.68, 0.5))
    c.paint(c.convex((-0.9, -0.12), (0, -0.85), (0.9, -0.12)), c.second)
    c.paint(c.box(-0.1, 0.55, 0.15, 0.3), DARK)
    c.paint(c.box(0.38, 0.25, 0.16, 0.15), GLASS)


def tree(c: Canvas):
    c.paint(c.box(0, 0.65, 0.13, 0.35), (0.36, 0.22, 0.12))
    for cx, cy, r in ((0, -0.45, 0.48), (-0.38, -0.05, 0.42), (0.38, -0.05, 0.42), (0, 0.05, 0.42)):
        c.paint(c.ellipse(cx, cy, r))


def flower(c: Canvas):
    c.paint(c.stroke(0, 0, 0.05, 0.95, 0.06), (0.2, 0.5, 0.2))
    for k in range(6):
        a = k * np.pi / 3
        c.paint(c.ellipse(0.42 * np.cos(a), -0.25 + 0.42 * np.sin(a), 0.3, 0.2, a))
    c.paint(c.ellipse(0, -0.25, 0.22), (0.95, 0.8, 0.2))


def mushroom(c: Canvas):
    c.paint(c.box(0, 0.45, 0.2, 0.45, soft=0.1), (0.93, 0.88, 0.78))
    c.paint(np.maximum(c.ellipse(0, 0.05, 0.85, 0.8), c.y - 0.1))


def fish(c: Canvas):
    c.paint(c.convex((-0.5, 0), (-1.0, -0.45), (-1.0, 0.45)), c.second)
    c.paint(c.ellipse(0.1, 0, 0.75, 0.46))
    c.paint(c.ellipse(0.5, -0.1, 0.13), LIGHT)
    c.paint(c.ellipse(0.53, -0.1, 0.07), DARK)


def eyes(c: Canvas, cx, cy, gap, r, iris=DARK):
    for side in (-1, 1):
        c.paint(c.ellipse(cx + side * gap, cy, r, r * 0.85), LIGHT)
        c.paint(c.ellipse(cx + side * gap, cy, r * 0.62), iris)


def muzzle(c: Canvas, cy, w):
    c.paint(c.ellipse(0, cy, w, w * 0.7), np.minimum(c.second * 0.3 + 0.65, 1))
    c.paint(c.ellipse(0, cy - w * 0.35, w * 0.32, w * 0.24), DARK)
    c.paint(c.stroke(-w * 0.5, cy + w * 0.3, 0, cy + w * 0.1, 0.025), DARK)
    c.paint(c.stroke(w * 0.5, cy + w * 0.3, 0, cy + w * 0.1, 0.025), DARK)


def cat(c: Canvas):
    for s in (-1, 1):
        c.paint(c.convex((s * 0.72, -0.98), (s * 0.12, -0.5), (s * 0.75, -0.2)))
        c.paint(c.convex((s * 0.66, -0.80), (s * 0.30, -0.5), (s * 0.66, -0.35)), (0.90, 0.62, 0.60))
    c.paint(c.ellipse(0, 0.1, 0.82, 0.72))
    iris = ((0.45, 0.65, 0.25), (0.85, 0.65, 0.2), (0.3, 0.55, 0.75))[c.rng.integers(3)]
    eyes(c, 0, -0.05, 0.34, 0.18, iris)
    for s in (-1, 1):
        c.paint(c.ellipse(s * 0.34, -0.05, 0.05, 0.1), DARK)
    muzzle(c, 0.40, 0.26)
    for s in (-1, 1):
        for dy in (0, 0.12):
            c.paint(c.stroke(s * 0.3, 0.38 + dy, s * 0.85, 0.3 + 2 * dy, 0.015), LIGHT, 0.8)


def dog(c: Canvas):
    c.paint(c.ellipse(0, 0.05, 0.66, 0.76))
    for s in (-1, 1):
        c.paint(c.ellipse(s * 0.68, -0.05, 0.22, 0.55, -s * 0.15), c.second * 0.8)
    eyes(c, 0, -0.15, 0.28, 0.13, (0.3, 0.18, 0.08))
    muzzle(c, 0.42, 0.36)


def wheels(c: Canvas, y, r, *xs):
    for x in xs:
        c.paint(c.ellipse(x, y, r), DARK)
        c.paint(c.ellipse(x, y, r * 0.5), (0.7, 0.7, 0.72))


def car(c: Canvas):
    c.paint(c.convex((-0.55, -0.05), (-0.35, -0.5), (0.3, -0.5), (0.58, -0.05)), c.second)
    c.paint(c.convex((-0.38, -0.08), (-0.25, -0.38), (0.22, -0.38), (0.4, -0.08)), GLASS)
    c.paint(c.box(0, 0.18, 0.95, 0.27, soft=0.1))
    wheels(c, 0.45, 0.24, -0.52, 0.52)


def boat(c: Canvas):
    c.paint(c.stroke(0, -0.9, 0, 0.3, 0.05), (0.4, 0.25, 0.15))
    c.paint(c.convex((0.08, -0.85), (0.75, 0.2), (0.08, 0.2)), c.second)
    c.paint(c.convex((-0.08, -0.6), (-0.08, 0.2), (-0.55, 0.2)), c.second * 0.9)
    c.paint(c.convex((-0.95, 0.3), (0.95, 0.3), (0.55, 0.8), (-0.55, 0.8)))


def robot(c: Canvas):
    c.paint(c.stroke(0, -0.7, 0, -0.95, 0.05), DARK)
    c.paint(c.box(0, 0.5, 0.62, 0.42, soft=0.08), c.second)
    c.paint(c.box(0, -0.28, 0.6, 0.44, soft=0.1))
    eyes(c, 0, -0.35, 0.26, 0.15, (0.2, 0.6, 0.9))
    c.paint(c.box(0, -0.02, 0.3, 0.06), DARK)


def butterfly(c: Canvas):
    for s in (-1, 1):
        c.paint(c.ellipse(s * 0.45, -0.3, 0.48, 0.42, s * 0.5))
        c.paint(c.ellipse(s * 0.38, 0.38, 0.36, 0.34, -s * 0.5), c.second)
    c.paint(c.ellipse(0, 0.05, 0.1, 0.62), DARK)


DRAWINGS = {
    f.__name__: f
    for f in (ball, cube, star, heart, cup, house, tree, flower, mushroom, fish, cat, dog, car, boat, robot, butterfly)
}
TEXTURES = ("plain", "striped", "spotted", "checkered", "furry", "shiny")


@dataclass(frozen=True)
class Thing:
    """A thing: its kind, the colours and the texture of its coat, and the seed of its details."""

    kind: str
    colour: str
    second: str
    texture: str
    seed: int

    @staticmethod
    def random(rng: np.random.Generator, kind: str) -> Thing:
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        texture = "plain" if rng.random() < 0.4 else TEXTURES[rng.integers(len(TEXTURES))]
        second = contrast(colour) if rng.random() < 0.5 else second_colour(rng, colour)
        return Thing(kind, colour, second, texture, int(rng.integers(2**31)))

    def draw(self, c: Canvas, rng: np.random.Generator) -> None:
        """Draw it in the frame of the canvas. `rng` is of the view, and changes nothing here."""
        c.rng = np.random.default_rng(self.seed)
        c.dress(COLOURS[self.colour], COLOURS[self.second], self.texture)
        DRAWINGS[self.kind](c)

    def words(self) -> tuple[list[str], list[str]]:
        """Adjectives before the kind, and phrases after it, of what can be seen."""
        return ([] if self.texture == "plain" else [self.texture]) + [self.colour], []
