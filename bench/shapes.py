"""The stacks that matter: rows of every cross-attention K and V projection of a U-Net, and the width of its text states."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """`sizes` are the rows N_g of each projection by width, `k` the width of the text states, `tokens` their count."""

    name: str
    sizes: tuple[int, ...]
    k: int
    tokens: int = 77

    @property
    def rows(self) -> int:
        return sum(self.sizes)


def _pairs(layers: dict[int, int]) -> tuple[int, ...]:
    """One K and one V projection for each cross-attention layer; `layers` counts them by width."""
    return tuple(width for width, count in layers.items() for _ in range(2 * count))


# small is the model that ships with the package
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("small", _pairs({32: 3, 96: 3, 160: 4}), 128, tokens=24),
        Shape("sd15", _pairs({320: 5, 640: 5, 1280: 6}), 768),
        Shape("sd21", _pairs({320: 5, 640: 5, 1280: 6}), 1024),
        Shape("sdxl", _pairs({640: 10, 1280: 60}), 2048),
    )
}
