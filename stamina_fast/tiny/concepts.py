"""Identities as concepts to learn: a folder of captioned views for each, and held-out views to compare samples with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ..io.files import make_folder, write_bytes, write_json
from ..io.images import write_image
from ..io.names import token_for
from .identities import Identity, view

TRAINED, HELD_OUT = 8, 16


def write_concepts(folder: str | Path, subjects: Mapping[str, Identity], size: int = 32, *, trained: int = TRAINED,
                   held_out: int = HELD_OUT) -> Path:
    """Write `folder`/concepts/NAME with captions, `folder`/held-out/NAME, and return `folder`/concepts_list.json.

    Three captions of four name the place, so that the token need not stand for it. Views with the seeds below 1000 are
    trained on, and those from 1000 on are held out. A token starts from the word of its subject's kind.
    """
    folder, entries = Path(folder), []
    for name, subject in subjects.items():
        token = token_for(name)
        pictures, others = make_folder(folder / "concepts" / name), make_folder(folder / "held-out" / name)
        for i in range(trained):
            picture, place = view(subject, i, size)
            caption = f"a photo of {token}" + (f" {place}" if i % 4 else "")
            _write(pictures / f"{i:02d}.png", picture)
            write_bytes(pictures / f"{i:02d}.txt", f"{caption}\n".encode())
        for i in range(held_out):
            _write(others / f"{i:02d}.png", view(subject, 1000 + i, size)[0])
        entries.append({"name": name, "instance_data_dir": f"concepts/{name}", "instance_prompt": f"a photo of {token}",
                        "class_prompt": f"a photo of a {subject.kind}", "initializer_token": subject.kind})
    write_json(folder / "concepts_list.json", entries)
    return folder / "concepts_list.json"


def _write(path: Path, picture: np.ndarray) -> None:
    write_image(path, Image.fromarray(picture))
