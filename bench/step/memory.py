"""Options that lower the memory of a training, and how much each saves: measured with and without it, or counted."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from . import measure
from .arms import Case, Lesson, Ours
from .models import networks, sharing

LIMIT = 8e9


def training(case: Case, base, taught: Lesson, backend: str) -> dict[str, int]:
    """Bytes of our training alone (see `measure.memory`), with the number of trained parameters."""
    common = measure.storages(networks(base))
    arm = Ours(case, taught, sharing(base), "ours", backend)
    held, _ = measure.grown(lambda: measure.begin(arm), case.device)
    found = measure.memory(arm, held, common)
    found["trained"] = sum(len(flat) for flat in arm.train.optimizer.flats)
    arm.close()
    return found


def text_kept(case: Case, base, taught: Lesson) -> int:
    """Bytes that the text encoders keep for the gradient of the token."""
    arm = Ours(case, taught, sharing(base), "ours", None)
    measure.begin(arm)
    kept = []
    held, _ = measure.grown(lambda: kept.append(arm.train.backbone.encode(arm.train.buffers.ids)), case.device)
    arm.close()
    return held


def encoding(case: Case, base) -> int:
    """The most bytes held while one batch of pictures is encoded, in fp32 as the trainer does it."""
    vae = base.vae
    pixels = torch.zeros(case.batch, 3, case.pixels, case.pixels, device=case.device, dtype=next(vae.parameters()).dtype)
    with torch.no_grad():
        return measure.grown(lambda: vae.encode(pixels), case.device)[1]


def bytes_of(*modules: nn.Module) -> int:
    return sum(measure.storages(list(modules)).values())


def levers(case: Case, base, taught: Lesson, backend: str) -> list[dict]:
    """Rows {"lever", "bytes" or None, "text"}: first the training as it is, last the training with all of them.

    Leaves `base` in bfloat16.
    """
    plain = training(dataclasses.replace(case, checkpointing=False), base, taught, backend)
    saving = training(dataclasses.replace(case, checkpointing=True), base, taught, backend)
    found = [row("peak without any lever", plain["peak"], f"{split(plain)}; {of(case)}")]
    found.append(row("--checkpointing", plain["step"] - saving["step"], "measured: activations computed again in backward"))
    found.append(row("peak with checkpointing", saving["peak"], split(saving)))
    texts = [base.text_encoder, *([base.text_encoder_2] if case.model.double else [])]
    kept = text_kept(case, base, taught)
    if case.dtype == torch.float32:
        for part in networks(base):
            nn.Module.to(part, torch.bfloat16)
        half = training(dataclasses.replace(case, checkpointing=True, dtype=torch.bfloat16), base, taught, backend)
        found.append(row("bfloat16 weights and activations", saving["peak"] - half["peak"], f"measured: {split(half)}"))
        saving = half
    vae = bytes_of(base.vae)
    found += [
        row("the VAE off the device once latents are cached", vae, "its weights"),
        row("latents cached", encoding(case, base), "measured: what encoding every step would hold besides; always on"),
        row("no token learned, text states kept", bytes_of(*texts) + kept,
            f"weights of the text encoder, and {kept / 1e6:.0f} MB measured that it keeps for the token's gradient"),
        row("moments in 8 bits", 6 * saving["trained"], f"computed: {saving['trained'] / 1e6:.2f} M trained parameters"),
    ]
    left = saving["peak"] - vae
    fits = "fits" if left < LIMIT else "does not fit"
    found.append(row("left with checkpointing, bfloat16 and the VAE away", left, f"{fits} 8 GB; {of(case)}"))
    return found


def of(case: Case) -> str:
    where = "GPU memory" if case.device.startswith("cuda") else "the CPU's allocator, so a GPU's figures differ"
    return f"{case.name} at {case.pixels} x {case.pixels} pixels, batch {case.batch}; {where}"


def split(found: dict[str, int]) -> str:
    named = (("networks", "networks"), ("own", "adapters, copies and moments"), ("step", "a step"))
    return ", ".join(f"{found[key] / 1e6:.0f} MB {name}" for key, name in named)


def row(lever: str, nbytes: int, text: str) -> dict:
    return {"lever": lever, "bytes": nbytes, "text": f"{nbytes / 1e6:.0f} MB, {text}"}
