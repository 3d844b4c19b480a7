"""What a run was started with, as plain values, so that going on with anything else is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

from ..errors import InputError

# where the model and the pictures lie may change while a run waits to go on, and what changes no result; what they hold may not
FREE = ("model", "folder", "save_every", "capture", "cache_latents")
SAMPLES = 64


def fingerprint(pipeline) -> str:
    """SHA-256 over the vocabularies, and up to 64 evenly spaced values of every tensor of the U-Net and text encoders."""
    digest = hashlib.sha256()
    for part in ("tokenizer", "tokenizer_2"):
        if getattr(pipeline, part, None) is not None:
            digest.update(repr(sorted(getattr(pipeline, part).get_vocab().items())).encode())
    for part in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        if module is None:
            continue
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            spaced = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].double().cpu()
            digest.update(f"{part}.{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(spaced.numpy().tobytes())
    return digest.hexdigest()


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
