"""A procedural captioned world: the pictures that the small model is pre-trained on.

A scene is a place with one or two identities, faces, landmarks or things, and a caption with a small grammar. Everything is
drawn from signed distance functions in numpy, so a scene is a pure function of its seed.
"""

from __future__ import annotations

import numpy as np

from .canvas import Canvas
from .colours import COLOURS
from .faces import HAIR_COLOURS, SKINS
from .identities import KINDS, article_of, backdrop, draw_identity, finish, place_subject
from .places import PLACES, paint_place
from .things import TEXTURES

# the words that a caption can have, so that it fits into the text encoder with its start and its end
WORDS = 22
SIDES = {"on the left": (-0.48, 0), "on the right": (0.48, 0), "at the top": (0, -0.48), "at the bottom": (0, 0.48)}
RELATIONS = {"left of": (-0.5, 0), "right of": (0.5, 0), "above": (0, -0.5), "below": (0, 0.5)}


def scene(seed: int, size: int = 32) -> tuple[np.ndarray, str]:
    """The picture `[size, size, 3]` uint8 and the caption of one seed."""
    rng = np.random.default_rng(seed)
    c = Canvas(rng, 2 * size)
    drawing = rng.random() < 0.08
    c.shading = 0.0 if drawing else 1.0
    painted, where = backdrop(rng)
    said = "" if rng.random() < 0.15 else f" {where}"
    paint_place(c, painted)
    opening = "a drawing of" if drawing else "a picture of" if rng.random() < 0.2 else "a photo of"
    left = WORDS - len((opening + said).split())
    layout, jitter = rng.random(), rng.normal(0, 0.06, 4)
    one = draw_identity(rng)
    if layout < 0.70:
        place_subject(c, one, rng, jitter[0], jitter[1], rng.uniform(0.72, 1.0))
        text = article_of(one, rng, left)
    elif layout < 0.80:
        # a close-up: the subject fills the picture and is cut off by its edge
        place_subject(c, one, rng, 2 * jitter[0], 2 * jitter[1], rng.uniform(1.1, 1.35))
        opening, text = "a close up of", article_of(one, rng, left - 1)
    elif layout < 0.84:
        side = list(SIDES)[rng.integers(len(SIDES))]
        dx, dy = SIDES[side]
        place_subject(c, one, rng, dx + jitter[0], dy + jitter[1], rng.uniform(0.38, 0.5))
        text = f"{article_of(one, rng, left - 3)} {side}"
    else:
        relation = ("left of", "right of", "left of", "right of", "above", "below")[rng.integers(6)]
        dx, dy = RELATIONS[relation]
        two = draw_identity(rng)
        place_subject(c, one, rng, dx + jitter[0], dy + jitter[1], rng.uniform(0.44, 0.54))
        place_subject(c, two, rng, -dx + jitter[2], -dy + jitter[3], rng.uniform(0.44, 0.54))
        half = (left - 2) // 2
        text = f"{article_of(one, rng, half)} {relation} {article_of(two, rng, half)}"
    return finish(c, rng, size), f"{opening} {text}{said}"


def vocabulary() -> list[str]:
    """Every word that a caption can hold."""
    grammar = "a an photo picture drawing close up of on in at by the left right top bottom above below background and with"
    looks = "bald long short curly hair beard glasses sunglasses hat shirt wide narrow pointed flat round bright windows"
    names = (COLOURS, TEXTURES[1:], KINDS, SKINS, HAIR_COLOURS, " ".join(PLACES).split())
    return sorted({*grammar.split(), *looks.split(), *(word for words in names for word in words)})
