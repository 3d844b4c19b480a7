"""Which backend runs a call, why the others were refused, and what has run."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from . import cpu, cuda

NAMES = ("reference", "cpu", "triton", "cuda")

# backends that became an architecture's default, by a committed result on that architecture: {(9, 0): "triton"}
VERIFIED: dict[tuple[int, int], str] = {}

_launches: Counter[str] = Counter()


def count(operator: str, backend: str) -> None:
    _launches[f"{operator}/{backend}"] += 1


def launches() -> dict[str, int]:
    """Calls since import, {"operator/backend": calls}: proof of what ran. A compiled call counts when it runs."""
    return dict(_launches)


@cache
def _triton() -> tuple[ModuleType | None, str]:
    try:
        triton = import_module("triton")
    except ImportError as error:
        return None, f"triton cannot be imported ({error}); install triton >= 3.6 (Linux)"
    if triton.knobs.runtime.interpret:
        return triton, f"triton {triton.__version__}, interpreter on the CPU: slow, for tests; bf16 is refused"
    if not torch.cuda.is_available():
        return None, "triton needs a GPU; TRITON_INTERPRET=1 runs it in the interpreter"
    return triton, f"triton {triton.__version__}"


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on tensors of the CPU."""
    triton, _ = _triton()
    return triton is not None and triton.knobs.runtime.interpret


def backends() -> dict[str, tuple[bool, str]]:
    """{"reference" | "cpu" | "triton" | "cuda": (available, reason)}."""
    return {
        "reference": (True, "plain torch, anywhere"),
        "cpu": (not cpu.load(), cpu.load() or f"threads, {' or '.join(cpu.instruction_sets())}"),
        "triton": (_triton()[0] is not None, _triton()[1]),
        "cuda": (not cuda.load(), cuda.load() or "CUDA kernels for bfloat16 and float16, sm_80 and newer"),
    }


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `name` cannot run tensors of this device and dtype, or None."""
    available, reason = backends()[name]
    if not available:
        return reason
    if name == "cpu" and device.type != "cpu":
        return f"it runs cpu tensors, got {device.type}"
    if name == "cuda" and (device.type != "cuda" or dtype not in cuda.DTYPES):
        return f"it runs bfloat16 and float16 on a GPU, got {dtype} on {device.type}; other dtypes run on triton or reference"
    if name == "triton":
        wanted = "cpu" if interpreted() else "cuda"
        if device.type != wanted:
            return f"{reason}; it runs {wanted} tensors here, got {device.type}"
        if interpreted() and dtype == torch.bfloat16:
            return "the interpreter computes bf16 wrongly without a word; use float32 or float16"
        if not interpreted() and dtype == torch.float64:
            return "float64 runs on the reference backend only"
    return None


def choose(requested: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for a call: the argument, else STAMINA_BACKEND, else what has been verified on this GPU's architecture, or
    the compiled one on a CPU, else the reference.

    Raises ValueError for an unknown name, RuntimeError with the reason where the named backend cannot run the call.
    """
    name = requested or os.environ.get("STAMINA_BACKEND")
    if name:
        if name not in NAMES:
            raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
        refusal = _refusal(name, device, dtype)
        if refusal:
            raise RuntimeError(f"backend {name!r} cannot run this call: {refusal}")
        return name
    if device.type == "cuda":
        verified = VERIFIED.get(torch.cuda.get_device_capability(device))
        if verified and _refusal(verified, device, dtype) is None:
            return verified
    return "cpu" if _refusal("cpu", device, dtype) is None else "reference"
