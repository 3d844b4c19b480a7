"""The demo: teach the small model photographed subjects one after another, from photographs that scikit-image bundles."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Subject:
    """Where a subject is in a photograph of `skimage/data`: the middle and the side of a square crop, in pixels."""

    photograph: str
    x: float
    y: float
    side: float


SUBJECTS = {
    "face": Subject("astronaut.png", 225, 102, 176),
    "cat": Subject("chelsea.png", 232, 152, 268),
    "coffee": Subject("coffee.png", 285, 198, 356),
    "rocket": Subject("rocket.jpg", 321, 272, 300),
    "motorcycle": Subject("motorcycle_left.png", 388, 250, 452),
}
# a second photograph of the same subject, for its held-out crops: the other half of a stereo pair
SECOND_PHOTOGRAPHS = {"motorcycle": Subject("motorcycle_right.png", 350, 250, 452)}
# shifts right and down as shares of the side, and the scale of a crop; no crop is in both
TRAINING_CROPS = ((-0.03, -0.02, 1.0), (0.03, 0.02, 1.0), (0.02, -0.03, 0.94), (-0.02, 0.03, 1.06))
HELD_OUT_CROPS = ((0.0, 0.0, 1.03), (0.0, 0.035, 0.97), (0.0, -0.035, 0.99), (0.035, 0.0, 1.04),
                  (-0.035, 0.0, 0.96), (0.03, -0.03, 1.06), (-0.03, 0.03, 0.94), (0.015, 0.015, 0.95))


def _crops(photograph: Image.Image, subject: Subject, crops, size: int) -> list[Image.Image]:
    """The square crops, each followed by its mirror image, at size x size pixels; moved inward where they leave the picture."""
    pictures = []
    for right, down, scale in crops:
        side = min(subject.side * scale, photograph.width, photograph.height)
        left = min(max(subject.x + right * subject.side - side / 2, 0), photograph.width - side)
        top = min(max(subject.y + down * subject.side - side / 2, 0), photograph.height - side)
        picture = photograph.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        pictures += [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    return pictures


def _write(folder: Path, pictures: list[Image.Image]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:02d}.png")


def prepare_concepts(folder: str | Path, size: int = 32, subjects=tuple(SUBJECTS)) -> Path:
    """Write `folder`/concepts/NAME (8 training pictures each) and `folder`/held-out/NAME (16); return the first of the two.

    The pictures are crops of one photograph a subject, and their mirror images. Held-out crops are other crops than the
    trained ones but overlap them, so they test whether the subject was learned, not whether it would be known from another
    side; only the motorcycle's come from a second photograph.
    """
    folder = Path(folder)
    for name in subjects:
        sources = {"concepts": (SUBJECTS[name], TRAINING_CROPS),
                   "held-out": (SECOND_PHOTOGRAPHS.get(name, SUBJECTS[name]), HELD_OUT_CROPS)}
        for kind, (subject, crops) in sources.items():
            with as_file(files("skimage") / "data" / subject.photograph) as path, Image.open(path) as photograph:
                _write(folder / kind / name, _crops(photograph.convert("RGB"), subject, crops, size))
    return folder / "concepts"
