"""The landmarks of the small world: towers, castles, temples, bridges and domes by shape, colours, roof and windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Canvas
from .colours import COLOURS, DARK, contrast, second_colour
from .faces import article

KINDS = ("tower", "castle", "temple", "bridge", "dome")
ROOFS = ("pointed", "flat", "round")
PATTERNS = ("plain", "plain", "plain", "striped")
LIT = (0.99, 0.90, 0.55)


@dataclass(frozen=True)
class Landmark:
    """A building. `width` in [0, 1] is from narrow to wide; `count` its storeys, turrets, columns or arches."""

    kind: str
    colour: str
    roof: str
    roof_colour: str
    pattern: str
    width: float
    count: int
    lit: bool
    seed: int

    @staticmethod
    def random(rng: np.random.Generator, kind: str) -> Landmark:
        colour = second_colour(rng, "black")
        return Landmark(
            kind, colour, ROOFS[rng.integers(len(ROOFS))], second_colour(rng, colour), PATTERNS[rng.integers(len(PATTERNS))],
            rng.uniform(), int(rng.integers(4)), rng.random() < 0.4, int(rng.integers(2**31)),
        )

    def draw(self, c: Canvas, rng: np.random.Generator) -> None:
        """Draw it in the frame of the canvas. `rng` is of the view, and changes nothing here."""
        c.rng = np.random.default_rng(self.seed)
        c.dress(COLOURS[self.colour], COLOURS[contrast(self.colour)], self.pattern)
        getattr(self, f"_{self.kind}")(c, np.asarray(COLOURS[self.roof_colour]), LIT if self.lit else DARK)

    def _top(self, c: Canvas, x: float, y: float, half: float, height: float, colour, roof: str | None = None) -> None:
        """A roof of this half width and height, whose eaves are at (x, y)."""
        roof = roof or self.roof
        if roof == "pointed":
            c.paint(c.convex((x - half, y), (x, y - height), (x + half, y)), colour)
        elif roof == "round":
            c.paint(np.maximum(c.ellipse(x, y, half, height), c.y - y), colour)
        else:
            for k in (-1, 0, 1):
                c.paint(c.box(x + k * half * 0.72, y - 0.12, half * 0.28, 0.14), colour)
            c.paint(c.box(x, y - 0.02, half, 0.07), colour)

    def _tower(self, c: Canvas, roof, glass) -> None:
        half = 0.20 + 0.18 * self.width
        c.paint(c.convex((-half, -0.45), (half, -0.45), (half * 1.25, 0.95), (-half * 1.25, 0.95)))
        for k in range(self.count + 1):
            c.paint(c.box(0, -0.22 + 0.30 * k, half * 0.36, 0.085), glass)
        self._top(c, 0, -0.42, half * 1.35, 0.52, roof)

    def _castle(self, c: Canvas, roof, glass) -> None:
        half = 0.62 + 0.22 * self.width
        c.paint(c.box(0, 0.48, half, 0.46))
        for k in range(4):
            c.paint(c.box((k - 1.5) * half * 0.5, -0.02, half * 0.14, 0.10))
        turrets = ((-1, 1), (-1, 0, 1))[self.count % 2]
        for k in turrets:
            top = -0.52 if k == 0 else -0.22
            c.paint(c.box(k * half, (top + 0.94) / 2, 0.19, (0.94 - top) / 2))
            self._top(c, k * half, top, 0.27, 0.42, roof)
            c.paint(c.box(k * half, top + 0.30, 0.06, 0.10), glass)
        c.paint(np.minimum(c.box(0, 0.76, 0.17, 0.18), c.ellipse(0, 0.58, 0.17)), DARK)

    def _temple(self, c: Canvas, roof, glass) -> None:
        half, columns = 0.66 + 0.26 * self.width, 3 + self.count
        c.paint(c.box(0, 0.86, half + 0.06, 0.10))
        c.paint(c.box(0, 0.26, half * 0.9, 0.52), np.asarray(glass) * 0.8 + 0.04)
        gap = 2 * half * 0.88 / (columns - 1)
        for k in range(columns):
            c.paint(c.box(-half * 0.88 + k * gap, 0.28, min(0.11, gap * 0.30), 0.50))
        c.paint(c.box(0, -0.28, half, 0.10))
        self._top(c, 0, -0.36, half, 0.50, roof)

    def _bridge(self, c: Canvas, roof, glass) -> None:
        hung = self.roof == "pointed"
        deck = 0.30 if hung else -0.02
        if hung:
            reach = 0.42 + 0.14 * self.width
            for side in (-1, 1):
                c.paint(c.box(side * reach, 0.14, 0.075, 0.82), roof)
                for k in range(1, 5):
                    for way in (-1, 1):
                        c.paint(c.stroke(side * reach, -0.62, side * reach + way * 0.13 * k, deck, 0.022), roof)
        c.paint(c.box(0, deck, 1.05, 0.12))
        if hung:
            return
        below = c.box(0, 0.44, 1.05, 0.48)
        arches = 2 + self.count % 3
        for k in range(arches):
            x, half = -1.05 + 2.1 * (k + 0.5) / arches, 0.78 / arches
            opening = np.minimum(c.ellipse(x, 0.50, half, half), c.box(x, 0.75, half, 0.25))
            below = np.maximum(below, -opening)
        c.paint(below)
        c.paint(c.box(0, deck - 0.14, 1.05, 0.05), roof)
        if self.roof == "round":
            for side in (-1, 1):
                c.paint(c.box(side * 0.72, -0.30, 0.12, 0.30))
                self._top(c, side * 0.72, -0.56, 0.17, 0.22, roof, "pointed")

    def _dome(self, c: Canvas, roof, glass) -> None:
        half = 0.46 + 0.14 * self.width
        c.paint(c.box(0, 0.60, half + 0.10, 0.36))
        for k in range(1 + self.count % 3):
            x = (k - (self.count % 3) / 2) * 0.34
            c.paint(np.minimum(c.box(x, 0.74, 0.09, 0.18), c.ellipse(x, 0.56, 0.09)), glass)
        c.paint(np.maximum(c.ellipse(0, 0.26, half, 0.78 if self.roof == "pointed" else 0.60), c.y - 0.26), roof)
        c.paint(c.stroke(0, -0.50, 0, -0.72, 0.04), roof)
        if self.roof != "flat":
            for side in (-1, 1):
                c.paint(c.box(side * 0.84, 0.36, 0.09, 0.60))
                self._top(c, side * 0.84, -0.22, 0.13, 0.26, roof, "pointed")

    def words(self) -> tuple[list[str], list[str]]:
        """Adjectives before the kind, and phrases after it, of what can be seen."""
        size = ["wide"] if self.width > 0.67 else ["narrow"] if self.width < 0.33 else []
        pattern = [] if self.pattern == "plain" else [self.pattern]
        roofed = f"{self.roof_colour} top" if self.kind == "bridge" else f"{self.roof} {self.roof_colour} top"
        return size + pattern + [self.colour], [f"with {article(roofed)}"] + (["with bright windows"] if self.lit else [])
