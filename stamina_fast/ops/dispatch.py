"""Which backend runs a call, why the others were refused, and what has run."""

from __future__ import annotations

import os
from collections import Counter

import torch

from .backend import Backend
from .cpu import Cpu
from .cuda import Cuda
from .reference import Reference
from .triton import Triton

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Reference(), Cpu(), Triton(), Cuda())}

# where no backend is named, the first of these that can run the call
PREFERRED = {"cpu": ("cpu", "reference")}
OTHERWISE = ("reference",)

# backends that became an architecture's default, by a committed result on that architecture: {(9, 0): "triton"}
VERIFIED: dict[tuple[int, int], str] = {}

_launches: Counter[str] = Counter()


def count(operator: str, backend: str) -> None:
    _launches[f"{operator}/{backend}"] += 1


def launches() -> dict[str, int]:
    """Calls since import, {"operator/backend": calls}: proof of what ran. A compiled call counts when it runs."""
    return dict(_launches)


def backends() -> dict[str, tuple[bool, str]]:
    """{"reference" | "cpu" | "triton" | "cuda": (available, reason)}."""
    missing = {name: backend.missing() for name, backend in BACKENDS.items()}
    return {name: (not why, why or BACKENDS[name].summary()) for name, why in missing.items()}


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why the backend called `name` cannot run tensors of this device and dtype; empty where it can."""
    backend = BACKENDS[name]
    return backend.missing() or backend.refusal(device, dtype)


def choose(requested: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for a call: the argument, else STAMINA_BACKEND, else what has been verified on this GPU's architecture, else
    the first that is preferred on this kind of device.

    Raises ValueError for an unknown name, RuntimeError with the reason where the named backend cannot run the call.
    """
    name = requested or os.environ.get("STAMINA_BACKEND")
    if name:
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
        why = refusal(name, device, dtype)
        if why:
            raise RuntimeError(f"backend {name!r} cannot run this call: {why}")
        return name
    names = PREFERRED.get(device.type, OTHERWISE)
    if device.type == "cuda":
        verified = VERIFIED.get(torch.cuda.get_device_capability(device))
        names = (verified, *names) if verified else names
    return next(name for name in names if not refusal(name, device, dtype))


def running(operator: str, requested: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for a call of this operator, which is counted."""
    name = choose(requested, device, dtype)
    count(operator, name)
    return BACKENDS[name]
