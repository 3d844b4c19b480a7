"""Samples of a run, drawn once and kept as pictures, so that any measure can read them later.

    RUN/samples/settings.json                     what they depend on, apart from the run and the guidance
    RUN/samples/gG/STAGE/NAME/0000.png, …         at guidance G; STAGE is base, after-01, after-02, … or another name
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..errors import FileError
from ..io.files import clear_errors, make_folder, new_folder, read_json, remove, write_json
from ..io.images import open_image, write_image
from ..io.names import inside, safe_name
from ..pipeline.sampling import sample, to_pil

BASE = "base"


def after(task: int) -> str:
    """The stage after task number `task`, which counts from 0."""
    return f"after-{task + 1:02d}"


class Samples:
    """The samples in RUN/samples of one count, seed, number of sampler steps and size; older ones of others are removed.

    Raises FileError for a folder of that name with anything else in it.

    count   pictures in a folder; picture i starts from the same noise in every folder
    seed    of the noise
    steps   of the sampler
    size    height and width in pixels
    """

    def __init__(self, run_path: str | Path, *, count: int, seed: int, steps: int, size: int):
        self.path, self.how = Path(run_path) / "samples", {"count": count, "seed": seed, "steps": steps, "size": size}
        settings = self.path / "settings.json"
        if settings.is_file() and read_json(settings) == self.how:
            return
        with clear_errors("replace", self.path):
            if not settings.is_file() and self.path.is_dir() and any(self.path.iterdir()):
                raise FileError(f"{str(self.path)!r} holds files that are not samples of an evaluation; move them elsewhere")
            # first, so that a kill leaves no settings beside half of what they describe
            remove(settings)
            remove(self.path)
        make_folder(self.path)
        write_json(settings, self.how)

    @classmethod
    def of(cls, run_path: str | Path) -> Samples:
        """The samples that a run has."""
        return cls(run_path, **read_json(Path(run_path) / "samples" / "settings.json"))

    def folder(self, guidance: float, stage: str, name: str) -> Path:
        """Where the pictures of one prompt are, or will be."""
        return inside(self.path, f"g{guidance:g}", stage, safe_name(name))

    def drawn(self, guidance: float, stage: str, name: str) -> bool:
        """Whether they are there, which they are as a whole or not at all."""
        return self.folder(guidance, stage, name).is_dir()

    def draw(self, pipeline, prompt: str, guidance: float, stage: str, name: str) -> None:
        """Draw the pictures of a prompt with the pipeline as it is now, unless they are there."""
        if self.drawn(guidance, stage, name):
            return
        folder = self.folder(guidance, stage, name)
        make_folder(folder.parent)
        with new_folder(folder) as partial:
            for i, image in enumerate(to_pil(sample(pipeline, prompt, guidance=guidance, **self.how))):
                write_image(partial / f"{i:04d}.png", image)

    def read(self, guidance: float, stage: str, name: str) -> list[Image.Image]:
        """The pictures of one prompt, in order. Raises FileError if they were not drawn."""
        folder = self.folder(guidance, stage, name)
        if not folder.is_dir():
            raise FileError(f"there are no samples of {name!r} at guidance {guidance:g}, {stage}; run the evaluation again")
        with clear_errors("read", folder):
            return [open_image(path) for path in sorted(folder.glob("*.png"))]
