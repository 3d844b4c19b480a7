"""The record of what a run was started with, and the RUN folder that keeps it: resuming with anything else is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..adapter.config import StaminaConfig
from ..errors import InputError
from ..io.concepts import Concept
from ..io.files import read_bytes, sha256
from ..io.images import check_image
from ..io.run import Run
from ..pipeline.load import fingerprint
from .options import TrainOptions
from .ranks import Ranks

# these may change while a run waits to be resumed: where the model and the pictures lie, and what changes no result
FREE = ("model", "folder", "save_every", "capture", "cache_latents")


def record_of(pipeline, config: StaminaConfig, options: TrainOptions) -> dict:
    """What the record says of the model and the options."""
    return {"dtype": str(pipeline.unet.dtype).removeprefix("torch."), "fingerprint": fingerprint(pipeline),
            "stamina": config.to_dict(), "train": options.as_dict()}


def describe(concept: Concept, prior: bool) -> dict:
    """What the record says of a concept: its words, the folder of its pictures, and the SHA-256 of their files.

    Checks the pictures on the way (`images.check_image`), the class pictures only where `prior`. Nothing is decoded.
    """
    said = {"name": concept.name, "token": concept.token, "prompt": concept.prompt, "class_prompt": concept.class_prompt,
            "initializer_token": concept.initializer_token, "texts": list(concept.texts),
            "folder": str(concept.images[0].resolve().parent), "pictures": digest_of(concept.images)}
    return said | ({"class_pictures": digest_of(concept.class_images)} if prior else {})


def digest_of(pictures: tuple[Path, ...]) -> str:
    """SHA-256 over the SHA-256 of each picture's file, in order."""
    return sha256(" ".join(check_image(path) for path in pictures).encode())


def open_run(output: Path, record: dict, resume: bool, ranks: Ranks) -> Run:
    """The RUN folder, made by rank 0 and read by all. Raises InputError where it was started with anything else."""
    ranks.agree(sha256(repr(record).encode()), "was started with other options, pictures or another model")
    run = Run.create(output, record, resume=resume) if ranks.rank == 0 else None
    ranks.meet()
    run = run or Run.open(output)
    ranks.agree(sha256(read_bytes(output / "manifest.json")), "sees another RUN folder")
    # runs without this entry are from before training with several processes
    was = {"processes": 1} | run.config
    if was["processes"] != record["processes"]:
        raise InputError(
            f"cannot resume: the run was started with {was['processes']} processes, is {record['processes']} now, and would "
            f"end in other bits; start {was['processes']}, or choose another output folder"
        )
    check_same(was, record)
    return run


def check_same(was: Mapping, now: Mapping) -> None:
    """Raise InputError, naming the first difference, unless a run is resumed with what it was started with."""
    named = [{**record, "concepts": {concept["name"]: concept for concept in record["concepts"]}} for record in (was, now)]
    found = differences(*named)
    order = [list(record["concepts"]) for record in named]
    if not found and order[0] != order[1]:
        found = [f"the order of concepts was {', '.join(order[0])}, is {', '.join(order[1])}"]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise InputError(f"cannot resume: {found[0]}{more}; pass what the run was started with, or another output folder")


def differences(was: Mapping, now: Mapping, path: str = "") -> list[str]:
    """'where was X, is Y' for every value in which two records differ."""
    out = []
    for key in [*was, *(k for k in now if k not in was)]:
        where, old, new = f"{path}{key}", was.get(key), now.get(key)
        if key not in FREE and old != new:
            nested = isinstance(old, Mapping) and isinstance(new, Mapping)
            out += differences(old, new, f"{where}.") if nested else [f"{where} was {old!r}, is {new!r}"]
    return out
