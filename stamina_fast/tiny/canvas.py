"""A canvas for signed distance functions in numpy."""

from __future__ import annotations

import numpy as np


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
        """Make the coat of the object: a field of colours `[size, size, 3]` from which every part is cut."""
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
