"""STAMINA's masked low-rank residuals W + M ⊙ (A B), fused with the K/V projections of a U-Net."""

from importlib import import_module

from . import reference
from .dispatch import backends, launches
from .functional import fold_, gate_mask, gate_penalties, gate_uniforms, masked_linear
from .noise import GateNoise

__version__ = "0.1.0"

# what needs diffusers is imported when it is first asked for
_LATE = {"attach": "attach", "Adapters": "attach", "StaminaConfig": "config", "train": "train"}

__all__ = [
    "Adapters",
    "GateNoise",
    "StaminaConfig",
    "attach",
    "backends",
    "fold_",
    "gate_mask",
    "gate_penalties",
    "gate_uniforms",
    "launches",
    "masked_linear",
    "reference",
    "train",
]


def __getattr__(name: str):
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LATE[name]}", __name__), name)
    globals()[name] = value
    return value
