"""The faces of the small world: men and women by skin, hair, beard, glasses, hat and shirt; a view changes the expression."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Canvas
from .colours import COLOURS, DARK, LIGHT, contrast, second_colour

KINDS = ("man", "woman")
SKINS = {"pale": (0.98, 0.84, 0.74), "tanned": (0.86, 0.63, 0.44), "dark": (0.45, 0.29, 0.20)}
HAIR_COLOURS = {
    "black": (0.10, 0.08, 0.07), "brown": (0.38, 0.22, 0.11), "blond": (0.90, 0.74, 0.34), "red": (0.74, 0.26, 0.10),
    "white": (0.90, 0.90, 0.88), "blue": (0.20, 0.36, 0.85), "green": (0.20, 0.62, 0.30), "pink": (0.93, 0.45, 0.68),
}
HAIR = {"man": ("short", "short", "bald"), "woman": ("long", "long", "curly")}
PATTERNS = ("plain", "plain", "striped", "spotted")
MOUTHS = ("smiling", "open", "closed")


@dataclass(frozen=True)
class Face:
    """Head and shoulders. `width` is half the width of the head and `gap` half the distance of the eyes, in its own frame."""

    kind: str
    skin: str
    hair: str
    hair_colour: str
    beard: bool
    glasses: str | None
    hat: str | None
    shirt: str
    pattern: str
    width: float
    gap: float
    seed: int

    @staticmethod
    def random(rng: np.random.Generator, kind: str) -> Face:
        def pick(names):
            return list(names)[rng.integers(len(names))]

        glasses = (None, None, "glasses", "sunglasses")[rng.integers(4)]
        hat = pick(COLOURS) if rng.random() < 0.35 else None
        return Face(
            kind, pick(SKINS), pick(HAIR[kind]), pick(HAIR_COLOURS), kind == "man" and rng.random() < 0.4, glasses, hat,
            second_colour(rng, hat or ""), pick(PATTERNS), rng.uniform(0.46, 0.58), rng.uniform(0.19, 0.24),
            int(rng.integers(2**31)),
        )

    def draw(self, c: Canvas, rng: np.random.Generator) -> None:
        """Draw it in the frame of the canvas; the expression comes from `rng`, the rest from the face."""
        mouth, glance = MOUTHS[rng.integers(len(MOUTHS))], rng.uniform(-0.03, 0.03)
        c.rng = np.random.default_rng(self.seed)
        skin, hair, w = np.asarray(SKINS[self.skin]), np.asarray(HAIR_COLOURS[self.hair_colour]), self.width
        self._behind(c, hair, w)
        c.dress(COLOURS[self.shirt], COLOURS[contrast(self.shirt)], self.pattern)
        c.paint(c.ellipse(0, 1.12, 0.92, 0.52))
        c.paint(c.box(0, 0.62, 0.19, 0.22), skin * 0.86)
        for side in (-1, 1):
            c.paint(c.ellipse(side * w, 0.0, 0.10, 0.14), skin * 0.92)
        head = c.ellipse(0, 0, w, 0.68)
        c.paint(head, skin)
        if self.beard:
            c.paint(np.maximum(head, 0.22 - c.y), hair)
        self._before(c, hair, w, head)
        self._eyes(c, hair, glance)
        c.paint(c.stroke(0, 0.04, 0.02, 0.18, 0.035), skin * 0.75)
        if mouth == "closed":
            c.paint(c.stroke(-0.16, 0.38, 0.16, 0.38, 0.045), (0.70, 0.22, 0.24))
        elif mouth == "smiling":
            c.paint(np.maximum(c.ellipse(0, 0.32, 0.24, 0.16), 0.32 - c.y), (0.70, 0.22, 0.24))
            c.paint(np.maximum(c.ellipse(0, 0.32, 0.17, 0.08), 0.32 - c.y), LIGHT)
        else:
            c.paint(c.ellipse(0, 0.38, 0.12, 0.10), (0.50, 0.10, 0.12))
        if self.hat:
            self._hat(c, w)

    def _behind(self, c: Canvas, hair, w: float) -> None:
        if self.hair == "long":
            c.paint(c.ellipse(0, -0.08, w + 0.20, 0.80), hair)
            c.paint(c.box(0, 0.42, w + 0.18, 0.50, soft=0.15), hair)
        elif self.hair == "curly":
            for k in range(11):
                a = np.pi * (0.93 + 1.14 * k / 10)
                c.paint(c.ellipse((w + 0.14) * np.cos(a), 0.02 + 0.72 * np.sin(a), 0.24), hair)

    def _before(self, c: Canvas, hair, w: float, head) -> None:
        if self.hair == "bald":
            return
        cap = c.ellipse(0, -0.06, w + 0.06, 0.72)
        fringe = c.y + (0.34 if self.hair == "short" else 0.30)
        # the parting: the forehead shows as an arch in long hair
        if self.hair == "long":
            fringe = np.maximum(fringe, -c.ellipse(0, 0.02, w * 0.8, 0.50))
        c.paint(np.maximum(cap, fringe), hair)

    def _eyes(self, c: Canvas, hair, glance: float) -> None:
        y, gap = -0.06, self.gap
        for side in (-1, 1):
            c.paint(c.ellipse(side * gap, y, 0.115, 0.10), LIGHT)
            c.paint(c.ellipse(side * gap + glance, y, 0.065), DARK)
            c.paint(c.stroke(side * (gap - 0.10), y - 0.19, side * (gap + 0.10), y - 0.20, 0.035), hair * 0.6)
        if self.glasses == "sunglasses":
            for side in (-1, 1):
                c.paint(c.box(side * gap, y + 0.01, 0.17, 0.13, soft=0.08), DARK)
            c.paint(c.stroke(-self.width, y - 0.06, self.width, y - 0.06, 0.035), DARK)
        elif self.glasses:
            for side in (-1, 1):
                c.paint(np.abs(c.ellipse(side * gap, y, 0.18, 0.17)) - 0.035, DARK)
            for side in (-1, 1):
                c.paint(c.stroke(side * (gap + 0.18), y, side * self.width, y - 0.02, 0.035), DARK)

    def _hat(self, c: Canvas, w: float) -> None:
        colour = np.asarray(COLOURS[self.hat])
        c.paint(np.maximum(c.ellipse(0, -0.38, w + 0.05, 0.52), c.y + 0.36), colour)
        c.paint(c.box(0, -0.36, w + 0.20, 0.075, soft=0.05), colour * 0.75)

    def words(self) -> tuple[list[str], list[str]]:
        """Adjectives before the kind, and phrases after it, of what can be seen."""
        bald = self.hair == "bald"
        having = [] if bald else [f"{self.hair} {self.hair_colour} hair"]
        having += ["a beard"] if self.beard else []
        having += [self.glasses] if self.glasses else []
        having += [f"{article(self.hat)} hat"] if self.hat else []
        shirt = self.shirt if self.pattern == "plain" else f"{self.pattern} {self.shirt}"
        return [self.skin] + ["bald"] * bald, [f"with {what}" for what in having] + [f"in {article(shirt)} shirt"]


def article(words: str) -> str:
    """The words with 'a' or 'an' before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words
