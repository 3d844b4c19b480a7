"""A procedural captioned world: the pictures that the small model is pre-trained on.

A scene is a place, one or two objects with a colour, a texture, a size and a position, and a caption with a small
grammar. Everything is drawn from signed distance functions in numpy, so a scene is a pure function of its seed.
"""

from __future__ import annotations

from dataclasses import dataclass

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
SKIN = ((0.96, 0.80, 0.69), (0.87, 0.67, 0.52), (0.68, 0.47, 0.34), (0.42, 0.28, 0.20))
HAIR = ((0.12, 0.09, 0.07), (0.35, 0.20, 0.10), (0.75, 0.55, 0.25), (0.55, 0.22, 0.10), (0.70, 0.70, 0.70))


def value_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise in [0, 1], `[size, size]`, with about `cells` features along a side."""
    grid = rng.random((cells + 2, cells + 2), dtype=np.float32)
    t = np.linspace(0, cells, size, endpoint=False, dtype=np.float32)
    i = t.astype(int)
    f = t - i
    f = f * f * (3 - 2 * f)
    rows = grid[i] * (1 - f)[:, None] + grid[i + 1] * f[:, None]
    return rows[:, i] * (1 - f) + rows[:, i + 1] * f


class Canvas:
    """A picture `[size, size, 3]` in [0, 1] and the local frame in which the current object is drawn."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
        self.gx, self.gy = np.meshgrid(axis, axis)
        self.image = np.zeros((size, size, 3), np.float32)
        self.light = rng.uniform(-1, 1, 2) * (0.30, 0.15) + (0, -0.25)
        self.shading = 1.0
        self.place_object(0, 0, 1, 0, False)

    def place_object(self, cx, cy, scale, angle, mirrored):
        c, s = np.cos(angle), np.sin(angle)
        dx, dy = (self.gx - cx) / scale, (self.gy - cy) / scale
        self.x, self.y = c * dx + s * dy, -s * dx + c * dy
        if mirrored:
            self.x = -self.x
        self.edge = 2.5 / self.size / scale
        self.coat, self.second = None, None

    def dress(self, colour, second, texture):
        """The coat of the object: its colour field `[size, size, 3]`, made once and cut out by every part."""
        base = np.asarray(colour, np.float32) * self.rng.uniform(0.85, 1.1)
        x, y = self.x, self.y
        field = np.broadcast_to(base, (self.size, self.size, 3)).copy()
        mark = np.asarray(second, np.float32)
        amount = None
        if texture == "striped":
            angle, period = self.rng.uniform(0, np.pi), self.rng.uniform(0.28, 0.45)
            amount = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period) > 0
        elif texture == "spotted":
            period = self.rng.uniform(0.38, 0.5)
            shift = np.floor(y / period) % 2 * 0.5
            u, v = (x / period + shift) % 1 - 0.5, (y / period) % 1 - 0.5
            amount = u * u + v * v < 0.10
        elif texture == "checkered":
            period = self.rng.uniform(0.34, 0.5)
            amount = (np.floor(x / period) + np.floor(y / period)) % 2 > 0
        elif texture == "furry":
            fur = value_noise(self.rng, self.size, 22)[..., None] * 0.6 + value_noise(self.rng, self.size, 9)[..., None] * 0.4
            field *= 0.55 + 0.9 * fur
        if amount is not None:
            field = np.where(amount[..., None], mark, field)
        if self.shading:
            shade = 1 + self.shading * (self.light[0] * x + self.light[1] * y) + 0.05
            if texture == "shiny":
                spot = np.exp(-((x + self.light[0] * 1.2) ** 2 + (y + 0.35) ** 2) / 0.06)
                shade = shade * 0.92
                field = field * shade[..., None] + spot[..., None] * 0.75
            else:
                field = field * shade[..., None]
        self.coat, self.second = field, mark

    def paint(self, distance, colour=None, opacity=1.0):
        """Cover the points with distance < 0; colour None is the object's coat."""
        alpha = np.clip(0.5 - distance / self.edge, 0, 1)[..., None] * opacity
        if colour is None:
            field = self.coat
        else:
            field = np.asarray(colour, np.float32)
            if self.shading:
                field = field * (1 + 0.7 * self.shading * (self.light[0] * self.x + self.light[1] * self.y))[..., None]
        self.image += (field - self.image) * alpha

    # signed distances in the local frame (negative inside)
    def ellipse(self, cx, cy, rx, ry=None, turn=0.0):
        ry = rx if ry is None else ry
        dx, dy = self.x - cx, self.y - cy
        c, s = np.cos(turn), np.sin(turn)
        u, v = (c * dx + s * dy) / rx, (-s * dx + c * dy) / ry
        return (np.sqrt(u * u + v * v) - 1) * min(rx, ry)

    def box(self, cx, cy, hw, hh, turn=0.0, soft=0.0):
        dx, dy = self.x - cx, self.y - cy
        c, s = np.cos(turn), np.sin(turn)
        u, v = np.abs(c * dx + s * dy) - hw + soft, np.abs(-s * dx + c * dy) - hh + soft
        return np.hypot(np.maximum(u, 0), np.maximum(v, 0)) + np.minimum(np.maximum(u, v), 0) - soft

    def convex(self, *points):
        """A convex polygon of these corners, in any order."""
        cx, cy = np.mean(points, axis=0)
        points = sorted(points, key=lambda p: np.arctan2(p[1] - cy, p[0] - cx))
        distance = np.full_like(self.x, -9)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            length = np.hypot(x1 - x0, y1 - y0)
            distance = np.maximum(distance, ((self.x - x0) * (y1 - y0) - (self.y - y0) * (x1 - x0)) / length)
        return distance

    def stroke(self, x0, y0, x1, y1, width):
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((self.x - x0) * dx + (self.y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        return np.hypot(self.x - x0 - t * dx, self.y - y0 - t * dy) - width


DARK, LIGHT, GLASS = (0.08, 0.08, 0.10), (0.96, 0.96, 0.94), (0.62, 0.80, 0.90)


def ball(c):
    c.paint(c.ellipse(0, 0, 0.85))


def cube(c):
    c.paint(c.box(0, 0, 0.72, 0.72, soft=0.05))
    c.paint(c.convex((-0.72, -0.72), (-0.42, -0.95), (0.98, -0.95), (0.72, -0.72)), c.second)
    c.paint(c.convex((0.72, -0.72), (0.98, -0.95), (0.98, 0.45), (0.72, 0.72)), c.second * 0.6)


def star(c):
    angle = np.arctan2(c.x, -c.y)
    wave = np.abs((angle * 5 / (2 * np.pi)) % 1 - 0.5) * 2
    c.paint(np.hypot(c.x, c.y) - (0.38 + 0.6 * wave))


def heart(c):
    c.paint(np.minimum(np.minimum(c.ellipse(-0.4, -0.3, 0.46), c.ellipse(0.4, -0.3, 0.46)),
                       c.convex((-0.82, -0.1), (0, -0.45), (0.82, -0.1), (0, 0.92))))


def ring(c):
    c.paint(np.abs(np.hypot(c.x, c.y) - 0.65) - 0.22)


def cup(c):
    c.paint(np.abs(c.ellipse(0.72, 0.05, 0.34, 0.36)) - 0.09)
    c.paint(c.convex((-0.75, -0.5), (0.75, -0.5), (0.52, 0.8), (-0.52, 0.8)))
    c.paint(c.ellipse(0, -0.5, 0.75, 0.24))
    c.paint(c.ellipse(0, -0.48, 0.62, 0.17), (0.30, 0.17, 0.08) if c.rng.random() < 0.6 else DARK)


def plate(c):
    c.paint(c.ellipse(0, 0, 0.95, 0.75))
    c.paint(c.ellipse(0, -0.03, 0.66, 0.50), c.second)


def bottle(c):
    c.paint(c.box(0, 0.3, 0.38, 0.65, soft=0.12))
    c.paint(c.box(0, -0.6, 0.15, 0.32))
    c.paint(c.box(0, -0.88, 0.19, 0.09), DARK)
    c.paint(c.box(0, 0.35, 0.39, 0.22), c.second)


def rocket(c):
    c.paint(c.convex((-0.2, 0.7), (0.2, 0.7), (0, 1.1)), (0.98, 0.65, 0.15))
    c.paint(c.convex((-0.3, 0.2), (-0.3, 0.72), (-0.68, 0.85)), c.second)
    c.paint(c.convex((0.3, 0.2), (0.68, 0.85), (0.3, 0.72)), c.second)
    c.paint(np.maximum(c.ellipse(0, 0.1, 0.34, 1.1), c.y - 0.72))
    c.paint(np.maximum(c.ellipse(0, 0.1, 0.34, 1.1), c.y + 0.5), c.second)
    c.paint(c.ellipse(0, -0.2, 0.15), GLASS)


def house(c):
    c.paint(c.box(0, 0.35, 0.68, 0.5))
    c.paint(c.convex((-0.9, -0.12), (0, -0.85), (0.9, -0.12)), c.second)
    c.paint(c.box(-0.1, 0.55, 0.15, 0.3), DARK)
    c.paint(c.box(0.38, 0.25, 0.16, 0.15), GLASS)


def tower(c):
    c.paint(c.box(0, 0.2, 0.33, 0.75))
    c.paint(c.convex((-0.45, -0.5), (0, -1.0), (0.45, -0.5)), c.second)
    for y in (-0.3, 0.1, 0.5):
        c.paint(c.box(0, y, 0.1, 0.1), DARK)


def tree(c):
    c.paint(c.box(0, 0.65, 0.13, 0.35), (0.36, 0.22, 0.12))
    for cx, cy, r in ((0, -0.45, 0.48), (-0.38, -0.05, 0.42), (0.38, -0.05, 0.42), (0, 0.05, 0.42)):
        c.paint(c.ellipse(cx, cy, r))


def flower(c):
    c.paint(c.stroke(0, 0, 0.05, 0.95, 0.06), (0.2, 0.5, 0.2))
    for k in range(6):
        a = k * np.pi / 3
        c.paint(c.ellipse(0.42 * np.cos(a), -0.25 + 0.42 * np.sin(a), 0.3, 0.2, a))
    c.paint(c.ellipse(0, -0.25, 0.22), (0.95, 0.8, 0.2))


def mushroom(c):
    c.paint(c.box(0, 0.45, 0.2, 0.45, soft=0.1), (0.93, 0.88, 0.78))
    c.paint(np.maximum(c.ellipse(0, 0.05, 0.85, 0.8), c.y - 0.1))


def apple(c):
    c.paint(c.stroke(0, -0.5, 0.12, -0.9, 0.06), (0.3, 0.2, 0.1))
    c.paint(np.minimum(c.ellipse(-0.27, 0.1, 0.52, 0.68), c.ellipse(0.27, 0.1, 0.52, 0.68)))
    c.paint(c.ellipse(0.32, -0.72, 0.24, 0.11, -0.4), (0.25, 0.6, 0.25))


def fish(c):
    c.paint(c.convex((-0.5, 0), (-1.0, -0.45), (-1.0, 0.45)), c.second)
    c.paint(c.ellipse(0.1, 0, 0.75, 0.46))
    c.paint(c.ellipse(0.5, -0.1, 0.13), LIGHT)
    c.paint(c.ellipse(0.53, -0.1, 0.07), DARK)


def bird(c):
    c.paint(c.convex((-0.5, 0.1), (-1.0, -0.15), (-0.95, 0.3)))
    c.paint(c.ellipse(-0.05, 0.15, 0.62, 0.42))
    c.paint(c.ellipse(0.48, -0.3, 0.32))
    c.paint(c.convex((0.74, -0.42), (1.05, -0.25), (0.74, -0.15)), (0.95, 0.6, 0.15))
    c.paint(c.ellipse(-0.12, 0.1, 0.38, 0.22, 0.3), c.second)
    c.paint(c.ellipse(0.56, -0.36, 0.07), DARK)
    c.paint(c.stroke(-0.1, 0.55, -0.1, 0.9, 0.04), DARK)
    c.paint(c.stroke(0.15, 0.55, 0.15, 0.9, 0.04), DARK)


def eyes(c, cx, cy, gap, r, iris=DARK):
    for side in (-1, 1):
        c.paint(c.ellipse(cx + side * gap, cy, r, r * 0.85), LIGHT)
        c.paint(c.ellipse(cx + side * gap, cy, r * 0.62), iris)


def muzzle(c, cy, w):
    c.paint(c.ellipse(0, cy, w, w * 0.7), np.minimum(c.second * 0.3 + 0.65, 1))
    c.paint(c.ellipse(0, cy - w * 0.35, w * 0.32, w * 0.24), (0.75, 0.40, 0.40) if c.rng.random() < 0.5 else DARK)
    c.paint(c.stroke(-w * 0.5, cy + w * 0.3, 0, cy + w * 0.1, 0.025), DARK)
    c.paint(c.stroke(w * 0.5, cy + w * 0.3, 0, cy + w * 0.1, 0.025), DARK)


def cat(c):
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


def dog(c):
    c.paint(c.ellipse(0, 0.05, 0.66, 0.76))
    for s in (-1, 1):
        c.paint(c.ellipse(s * 0.68, -0.05, 0.22, 0.55, -s * 0.15), c.second * 0.8)
    eyes(c, 0, -0.15, 0.28, 0.13, (0.3, 0.18, 0.08))
    muzzle(c, 0.42, 0.36)


def person(c, hair_long):
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


def man(c):
    person(c, False)


def woman(c):
    person(c, True)


def wheels(c, y, r, *xs):
    for x in xs:
        c.paint(c.ellipse(x, y, r), DARK)
        c.paint(c.ellipse(x, y, r * 0.5), (0.7, 0.7, 0.72))


def car(c):
    c.paint(c.convex((-0.55, -0.05), (-0.35, -0.5), (0.3, -0.5), (0.58, -0.05)), c.second)
    c.paint(c.convex((-0.38, -0.08), (-0.25, -0.38), (0.22, -0.38), (0.4, -0.08)), GLASS)
    c.paint(c.box(0, 0.18, 0.95, 0.27, soft=0.1))
    wheels(c, 0.45, 0.24, -0.52, 0.52)


def bike(c):
    for x in (-0.58, 0.58):
        c.paint(np.abs(np.hypot(c.x - x, c.y - 0.35) - 0.36) - 0.07, DARK)
    for a in ((-0.58, 0.35, -0.15, -0.25), (-0.15, -0.25, 0.4, -0.25), (0.4, -0.25, 0.02, 0.35), (0.02, 0.35, -0.15, -0.25),
              (0.58, 0.35, 0.35, -0.5), (-0.58, 0.35, 0.02, 0.35)):
        c.paint(c.stroke(*a, 0.075))
    c.paint(c.stroke(-0.35, -0.38, 0.0, -0.38, 0.07), DARK)
    c.paint(c.stroke(0.2, -0.55, 0.45, -0.5, 0.06), DARK)


def boat(c):
    c.paint(c.stroke(0, -0.9, 0, 0.3, 0.05), (0.4, 0.25, 0.15))
    c.paint(c.convex((0.08, -0.85), (0.75, 0.2), (0.08, 0.2)), c.second)
    c.paint(c.convex((-0.08, -0.6), (-0.08, 0.2), (-0.55, 0.2)), c.second * 0.9)
    c.paint(c.convex((-0.95, 0.3), (0.95, 0.3), (0.55, 0.8), (-0.55, 0.8)))


def robot(c):
    c.paint(c.stroke(0, -0.7, 0, -0.95, 0.05), DARK)
    c.paint(c.box(0, 0.5, 0.62, 0.42, soft=0.08), c.second)
    c.paint(c.box(0, -0.28, 0.6, 0.44, soft=0.1))
    eyes(c, 0, -0.35, 0.26, 0.15, (0.2, 0.6, 0.9))
    c.paint(c.box(0, -0.02, 0.3, 0.06), DARK)


def butterfly(c):
    for s in (-1, 1):
        c.paint(c.ellipse(s * 0.45, -0.3, 0.48, 0.42, s * 0.5))
        c.paint(c.ellipse(s * 0.38, 0.38, 0.36, 0.34, -s * 0.5), c.second)
    c.paint(c.ellipse(0, 0.05, 0.1, 0.62), DARK)


def hat(c):
    c.paint(c.ellipse(0, 0.45, 0.98, 0.24))
    c.paint(c.box(0, 0.0, 0.5, 0.48, soft=0.15))
    c.paint(c.box(0, 0.28, 0.51, 0.11), c.second)


def lamp(c):
    c.paint(c.stroke(0, 0, 0, 0.8, 0.06), DARK)
    c.paint(c.ellipse(0, 0.85, 0.45, 0.12), DARK)
    c.paint(c.convex((-0.35, -0.8), (0.35, -0.8), (0.72, 0.1), (-0.72, 0.1)))


OBJECTS = {
    f.__name__: f
    for f in (ball, cube, star, heart, ring, cup, plate, bottle, rocket, house, tower, tree, flower, mushroom, apple, fish,
              bird, cat, dog, man, woman, car, bike, boat, robot, butterfly, hat, lamp)
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
    """'a small striped red cat', each attribute named most of the time, so that a bare noun is known too."""
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
        texture = "plain" if rng.random() < 0.4 else TEXTURES[rng.integers(len(TEXTURES))]
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        if backdrop and colour == place:
            colour = "white" if place != "white" else "red"
        return Thing(kind, colour, texture, x, y, scale)

    layout = rng.random()
    jitter = rng.normal(0, 0.07, 4)
    opening = "a drawing of" if drawing else ("a photo of", "a picture of")[rng.integers(2)]
    if layout < 0.55:
        one = thing(jitter[0], jitter[1], rng.uniform(0.5, 0.9))
        text = phrase(rng, one, True)
        things = [one]
    elif layout < 0.65:
        # nearer than the frame: the object fills the picture and is cut by its edge
        one = thing(jitter[0] * 3, jitter[1] * 3, rng.uniform(1.0, 1.5))
        opening, text, things = "a close up of", phrase(rng, one, False), [one]
    elif layout < 0.80:
        side = rng.integers(4)
        dx, dy = ((-0.45, 0), (0.45, 0), (0, -0.45), (0, 0.45))[side]
        one = thing(dx + jitter[0], dy + jitter[1], rng.uniform(0.3, 0.45))
        text, things = phrase(rng, one, True) + " " + ("on the left", "on the right", "at the top", "at the bottom")[side], [one]
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
    """Every word that a caption can hold, and the words that prompts for concepts need."""
    grammar = "a an photo picture drawing close up of on in at by the left right top bottom above below and with background small big"
    words = grammar.split() + list(COLOURS) + list(TEXTURES) + list(OBJECTS) + " ".join(PLACES).split()
    return sorted(set(words))
