"""What a run was started with, as plain values, so that going on with anything else is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

from ..errors import InputError

# where the model and the pictures lie may change while a run waits to go on, and what changes no result; what they hold may not
FREE = ("model", "folder", "save_every", "capture", "cache_latents")


def digest_of(images: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the pixels of a concept's pictures, in order."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(str(list(image.shape)).encode())
        digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()


def differences(was: Mapping, now: Mapping, path: str = "") -> list[str]:
    """'where was X, is Y' for every value in which two records differ."""
    out = []
    for key in [*was, *(k for k in now if k not in was)]:
        where, old, new = f"{path}{key}", was.get(key), now.get(key)
        if key not in FREE and old != new:
            nested = isinstance(old, Mapping) and isinstance(new, Mapping)
            out += differences(old, new, f"{where}.") if nested else [f"{where} was {old!r}, is {new!r}"]
    return out


def check_same(was: Mapping, now: Mapping) -> None:
    """Raise InputError, naming the first difference, unless a run was started with what it is to go on with."""
    named = [{**record, "concepts": {concept["name"]: concept for concept in record["concepts"]}} for record in (was, now)]
    found = differences(*named)
    order = [list(record["concepts"]) for record in named]
    if not found and order[0] != order[1]:
        found = [f"the order of concepts was {', '.join(order[0])}, is {', '.join(order[1])}"]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise InputError(f"cannot resume: {found[0]}{more}; pass what the run was started with, or another output folder")
