"""The real images of a run's concepts: held-out ones kept in RUN/real, or the pictures that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..errors import InputError
from ..io.files import make_folder
from ..io.images import crop, list_images, load_image, open_image, to_picture, write_image
from ..io.names import inside, safe_name
from ..io.run import Run

HELD_OUT, TRAINED = "held out", "trained on"


def keep_held_out(run_path: str | Path, name: str, images: Sequence[str | Path]) -> Path:
    """Copy real images of a concept, which it is not trained on, to RUN/real/NAME as PNG. Every evaluation uses them."""
    folder = make_folder(inside(Path(run_path), "real", safe_name(name)))
    for i, path in enumerate(images):
        write_image(folder / f"{i:04d}.png", open_image(path))
    return folder


def held_out(run_path: str | Path, name: str) -> list[Image.Image]:
    """The real images of a concept that `keep_held_out` has copied."""
    return [open_image(path) for path in list_images(inside(Path(run_path), "real", safe_name(name)))]


def real_images(run: Run, size: int, real: str | Path | None = None) -> tuple[list[list[Image.Image]], str]:
    """The real images of every concept, as size x size squares from their middles, and whether they were held out.

    They come from `real`, a folder with one folder of pictures for each concept. Without it they come from RUN/real, where
    `keep_held_out` puts them. Without that either, they are the pictures that the run was trained on, and every number
    looks better than it is.
    """
    names = [task["name"] for task in run.tasks()]
    kept = run.path / "real"
    if real is not None or kept.is_dir():
        root, kind = Path(kept if real is None else real), HELD_OUT
        folders = {name: _folder_of(root, name) for name in names}
    else:
        kind, trained = TRAINED, {concept["name"]: Path(concept["folder"]) for concept in run.config["concepts"]}
        folders = {name: trained[name] for name in names}
    return [_squares(folder, name, size) for name, folder in folders.items()], kind


def _folder_of(root: Path, name: str) -> Path:
    """The folder in `root` with the concept's name; if there is none, or the name leads elsewhere, that with its safe name."""
    plain = root / name
    return plain if plain.is_dir() and plain.resolve().parent == root.resolve() else root / safe_name(name)


def _squares(folder: Path, name: str, size: int) -> list[Image.Image]:
    images = list_images(folder) if folder.is_dir() else []
    if len(images) < 2:
        raise InputError(f"{str(folder)!r} must hold at least two real pictures of {name!r}, got {len(images)}; "
                         "put some there, or give another folder with one folder of pictures for each concept")
    return [to_picture(crop(load_image(path), size)[0]) for path in images]
