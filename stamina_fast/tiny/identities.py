"""Identities: faces, landmarks and things as functions of a seed, and the views in which they are seen.

An identity is what a concept teaches: this woman, that tower. A view changes place, light, size, position, tilt, mirror and
expression, and leaves the identity as it is.
"""

from __future__ import annotations

import numpy as np

from . import faces, landmarks, things
from .canvas import Canvas
from .colours import COLOURS
from .faces import Face
from .landmarks import Landmark
from .places import PLACES, paint_place
from .things import Thing

Identity = Face | Landmark | Thing
GROUPS = {"face": faces.KINDS, "landmark": landmarks.KINDS, "thing": tuple(things.DRAWINGS)}
KINDS = tuple(kind for kinds in GROUPS.values() for kind in kinds)
_CLASSES = {kind: cls for group, cls in zip(GROUPS, (Face, Landmark, Thing), strict=True) for kind in GROUPS[group]}


def draw_identity(rng: np.random.Generator, kind: str | None = None) -> Identity:
    """An identity drawn with `rng`, of a random kind unless one of KINDS is given; the groups are equally likely."""
    kinds = list(GROUPS.values())[rng.integers(len(GROUPS))]
    kind = kind or kinds[rng.integers(len(kinds))]
    return _CLASSES[kind].random(rng, kind)


def identity(seed: int, kind: str | None = None) -> Identity:
    """The identity of a seed, of this kind, or of one that the seed draws too."""
    return draw_identity(np.random.default_rng([seed, 1]), kind)


def place_subject(c: Canvas, subject: Identity, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    """Draw a subject into the canvas, its middle at (x, y) and its half width `scale`, all of a canvas [-1, 1]²."""
    face = isinstance(subject, Face)
    c.place_object(x, y, scale, rng.normal(0, 0.07), rng.random() < 0.5)
    if c.shading and not face:
        c.paint(c.ellipse(0, 0.95, 0.85, 0.16), (0.05, 0.05, 0.05), 0.25)
    subject.draw(c, rng)


def finish(c: Canvas, rng: np.random.Generator, size: int) -> np.ndarray:
    """The picture `[size, size, 3]` uint8 of a canvas of twice the size, with a camera's exposure, white balance and grain."""
    image = c.image.reshape(size, 2, size, 2, 3).mean((1, 3))
    if c.shading:
        image = (image - 0.5) * rng.uniform(0.85, 1.1) + 0.5 + rng.normal(0, 0.025)
        image = image * (1 + rng.normal(0, 0.02, 3)) + rng.normal(0, 0.008, image.shape)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def view(subject: Identity, seed: int, size: int = 32) -> tuple[np.ndarray, str]:
    """One view of a subject: the picture `[size, size, 3]` uint8, and where it is, such as 'on a beach'."""
    rng = np.random.default_rng([seed, subject.seed, 2])
    c = Canvas(rng, 2 * size)
    place = list(PLACES)[rng.integers(len(PLACES))]
    paint_place(c, PLACES[place])
    x, y = rng.normal(0, 0.07, 2)
    place_subject(c, subject, rng, x, y, rng.uniform(0.74, 0.98))
    return finish(c, rng, size), place


def article_of(subject: Identity, rng: np.random.Generator, budget: int) -> str:
    """'a pale woman with long red hair': the kind, and what of its looks fits into `budget` words in all.

    Each trait is named more often than not, so that a bare kind is learned too.
    """
    before, after = subject.words()
    traits = [(False, text) for text in after] + [(True, word) for word in before]
    left, chosen = budget - 2, set()
    for i in rng.permutation(len(traits)):
        needed = len(traits[i][1].split())
        if rng.random() < 0.65 and needed <= left:
            chosen.add(i)
            left -= needed
    named = [text for i, (adjective, text) in enumerate(traits) if adjective and i in chosen] + [subject.kind]
    having = [text for i, (adjective, text) in enumerate(traits) if not adjective and i in chosen]
    withs = [text.removeprefix("with ") for text in having if text.startswith("with ")]
    others = [text for text in having if not text.startswith("with ")]
    phrases = (["with " + " and ".join(withs)] if withs else []) + others
    return " ".join([faces.article(" ".join(named)), *phrases])


def backdrop(rng: np.random.Generator) -> tuple[str, str]:
    """(what `paint_place` paints, how a caption says it): a place, or every fifth time a plain colour."""
    if rng.random() < 0.2:
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        return colour, f"on {faces.article(colour)} background"
    place = list(PLACES)[rng.integers(len(PLACES))]
    return PLACES[place], place
