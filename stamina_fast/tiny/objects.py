"""The objects of the small world, each drawn in its own frame [-1, 1]², y downwards, in the coat of the canvas."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas

SKIN = ((0.96, 0.80, 0.69), (0.87, 0.67, 0.52), (0.68, 0.47, 0.34), (0.42, 0.28, 0.20))
HAIR = ((0.12, 0.09, 0.07), (0.35, 0.20, 0.10), (0.75, 0.55, 0.25), (0.55, 0.22, 0.10), (0.70, 0.70, 0.70))
DARK, LIGHT, GLASS = (0.08, 0.08, 0.10), (0.96, 0.96, 0.94), (0.62, 0.80, 0.90)


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


def ring(c: Canvas):
    c.paint(np.abs(np.hypot(c.x, c.y) - 0.65) - 0.22)


def cup(c: Canvas):
    c.paint(np.abs(c.ellipse(0.72, 0.05, 0.34, 0.36)) - 0.09)
    c.paint(c.convex((-0.75, -0.5), (0.75, -0.5), (0.52, 0.8), (-0.52, 0.8)))
    c.paint(c.ellipse(0, -0.5, 0.75, 0.24))
    c.paint(c.ellipse(0, -0.48, 0.62, 0.17), (0.30, 0.17, 0.08) if c.rng.random() < 0.6 else DARK)


def plate(c: Canvas):
    c.paint(c.ellipse(0, 0, 0.95, 0.75))
    c.paint(c.ellipse(0, -0.03, 0.66, 0.50), c.second)


def bottle(c: Canvas):
    c.paint(c.box(0, 0.3, 0.38, 0.65, soft=0.12))
    c.paint(c.box(0, -0.6, 0.15, 0.32))
    c.paint(c.box(0, -0.88, 0.19, 0.09), DARK)
    c.paint(c.box(0, 0.35, 0.39, 0.22), c.second)


def rocket(c: Canvas):
    c.paint(c.convex((-0.2, 0.7), (0.2, 0.7), (0, 1.1)), (0.98, 0.65, 0.15))
    c.paint(c.convex((-0.3, 0.2), (-0.3, 0.72), (-0.68, 0.85)), c.second)
    c.paint(c.convex((0.3, 0.2), (0.68, 0.85), (0.3, 0.72)), c.second)
    c.paint(np.maximum(c.ellipse(0, 0.1, 0.34, 1.1), c.y - 0.72))
    c.paint(np.maximum(c.ellipse(0, 0.1, 0.34, 1.1), c.y + 0.5), c.second)
    c.paint(c.ellipse(0, -0.2, 0.15), GLASS)


def house(c: Canvas):
    c.paint(c.box(0, 0.35, 0.68, 0.5))
    c.paint(c.convex((-0.9, -0.12), (0, -0.85), (0.9, -0.12)), c.second)
    c.paint(c.box(-0.1, 0.55, 0.15, 0.3), DARK)
    c.paint(c.box(0.38, 0.25, 0.16, 0.15), GLASS)


def tower(c: Canvas):
    c.paint(c.box(0, 0.2, 0.33, 0.75))
    c.paint(c.convex((-0.45, -0.5), (0, -1.0), (0.45, -0.5)), c.second)
    for y in (-0.3, 0.1, 0.5):
        c.paint(c.box(0, y, 0.1, 0.1), DARK)


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


def apple(c: Canvas):
    c.paint(c.stroke(0, -0.5, 0.12, -0.9, 0.06), (0.3, 0.2, 0.1))
    c.paint(np.minimum(c.ellipse(-0.27, 0.1, 0.52, 0.68), c.ellipse(0.27, 0.1, 0.52, 0.68)))
    c.paint(c.ellipse(0.32, -0.72, 0.24, 0.11, -0.4), (0.25, 0.6, 0.25))


def fish(c: Canvas):
    c.paint(c.convex((-0.5, 0), (-1.0, -0.45), (-1.0, 0.45)), c.second)
    c.paint(c.ellipse(0.1, 0, 0.75, 0.46))
    c.paint(c.ellipse(0.5, -0.1, 0.13), LIGHT)
    c.paint(c.ellipse(0.53, -0.1, 0.07), DARK)


def bird(c: Canvas):
    c.paint(c.convex((-0.5, 0.1), (-1.0, -0.15), (-0.95, 0.3)))
    c.paint(c.ellipse(-0.05, 0.15, 0.62, 0.42))
    c.paint(c.ellipse(0.48, -0.3, 0.32))
    c.paint(c.convex((0.74, -0.42), (1.05, -0.25), (0.74, -0.15)), (0.95, 0.6, 0.15))
    c.paint(c.ellipse(-0.12, 0.1, 0.38, 0.22, 0.3), c.second)
    c.paint(c.ellipse(0.56, -0.36, 0.07), DARK)
    c.paint(c.stroke(-0.1, 0.55, -0.1, 0.9, 0.04), DARK)
    c.paint(c.stroke(0.15, 0.55, 0.15, 0.9, 0.04), DARK)


def eyes(c: Canvas, cx, cy, gap, r, iris=DARK):
    for side in (-1, 1):
        c.paint(c.ellipse(cx + side * gap, cy, r, r * 0.85), LIGHT)
        c.paint(c.ellipse(cx + side * gap, cy, r * 0.62), iris)


def muzzle(c: Canvas, cy, w):
    c.paint(c.ellipse(0, cy, w, w * 0.7), np.minimum(c.second * 0.3 + 0.65, 1))
    c.paint(c.ellipse(0, cy - w * 0.35, w * 0.32, w * 0.24), (0.75, 0.40, 0.40) if c.rng.random() < 0.5 else DARK)
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


def person(c: Canvas, hair_long):
    skin, hair = SKIN[c.rng.integers(len(SKIN))], HAIR[c.rng.integers(len(HAIR))]
    c.paint(c.ellipse(0, 1.15, 0.95, 0.55))
    if hair_long:
        c.paint(c.ellipse(0, 0.05, 0.70, 0.88), hair)
        c.paint(c.box(0, 0.5, 0.66, 0.4, soft=0.2), hair)
    else:
        c.paint(c.ellipse(0, -0.28, 0.60, 0.62), hair)
    c.paint(c.box(0, 0.62, 0.2, 0.25), np.asarray(skin) * 0.88)
    c.paint(c.ellipse(0, 0.05, 0.50, 0.65), skin)
    c.paint(np.maximum(c.ellipse(0, 0.0, 0.54, 0.68), c.y + (0.32 if hair_long else 0.38)), hair)
    for s in (-1, 1):
        c.paint(c.ellipse(s * 0.2, -0.02, 0.10, 0.06), LIGHT)
        c.paint(c.ellipse(s * 0.2, -0.02, 0.055), DARK)
        c.paint(c.stroke(s * 0.1, -0.16, s * 0.3, -0.17, 0.025), np.asarray(hair) * 0.7)
    c.paint(c.stroke(0, 0.05, 0.03, 0.22, 0.025), np.asarray(skin) * 0.75)
    c.paint(c.ellipse(0, 0.40, 0.17, 0.055), (0.72, 0.28, 0.28))
    if c.rng.random() < 0.5:
        c.paint(c.ellipse(0, 0.39, 0.11, 0.028), LIGHT)


def man(c: Canvas):
    person(c, False)


def woman(c: Canvas):
    person(c, True)


def wheels(c: Canvas, y, r, *xs):
    for x in xs:
        c.paint(c.ellipse(x, y, r), DARK)
        c.paint(c.ellipse(x, y, r * 0.5), (0.7, 0.7, 0.72))


def car(c: Canvas):
    c.paint(c.convex((-0.55, -0.05), (-0.35, -0.5), (0.3, -0.5), (0.58, -0.05)), c.second)
    c.paint(c.convex((-0.38, -0.08), (-0.25, -0.38), (0.22, -0.38), (0.4, -0.08)), GLASS)
    c.paint(c.box(0, 0.18, 0.95, 0.27, soft=0.1))
    wheels(c, 0.45, 0.24, -0.52, 0.52)


def bike(c: Canvas):
    for x in (-0.58, 0.58):
        c.paint(np.abs(np.hypot(c.x - x, c.y - 0.35) - 0.36) - 0.07, DARK)
    for a in ((-0.58, 0.35, -0.15, -0.25), (-0.15, -0.25, 0.4, -0.25), (0.4, -0.25, 0.02, 0.35), (0.02, 0.35, -0.15, -0.25),
              (0.58, 0.35, 0.35, -0.5), (-0.58, 0.35, 0.02, 0.35)):
        c.paint(c.stroke(*a, 0.075))
    c.paint(c.stroke(-0.35, -0.38, 0.0, -0.38, 0.07), DARK)
    c.paint(c.stroke(0.2, -0.55, 0.45, -0.5, 0.06), DARK)


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


def hat(c: Canvas):
    c.paint(c.ellipse(0, 0.45, 0.98, 0.24))
    c.paint(c.box(0, 0.0, 0.5, 0.48, soft=0.15))
    c.paint(c.box(0, 0.28, 0.51, 0.11), c.second)


def lamp(c: Canvas):
    c.paint(c.stroke(0, 0, 0, 0.8, 0.06), DARK)
    c.paint(c.ellipse(0, 0.85, 0.45, 0.12), DARK)
    c.paint(c.convex((-0.35, -0.8), (0.35, -0.8), (0.72, 0.1), (-0.72, 0.1)))


OBJECTS = {
    f.__name__: f
    for f in (ball, cube, star, heart, ring, cup, plate, bottle, rocket, house, tower, tree, flower, mushroom, apple, fish,
              bird, cat, dog, man, woman, car, bike, boat, robot, butterfly, hat, lamp)
}
