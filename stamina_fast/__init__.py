"""STAMINA's masked low-rank residuals W + M ⊙ (A B), fused with the K/V projections of a U-Net."""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

# each public name and the module it lives in, imported when the name is first asked for: the operators need torch alone
_HOMES = {
    "Adapters": "attach",
    "GateNoise": "noise",
    "StaminaConfig": "config",
    "StaminaError": "errors",
    "TrainOptions": "train",
    "attach": "attach",
    "backends": "dispatch",
    "fold_": "functional",
    "gate_mask": "functional",
    "gate_penalties": "functional",
    "gate_uniforms": "functional",
    "launches": "dispatch",
    "masked_linear": "functional",
    "rebuild_": "functional",
    "reference": None,
    "train": "train",
}

__all__ = list(_HOMES)


class _Package(ModuleType):
    """Importing stamina_fast.attach or .train must not hide the public function of the same name behind the module."""

    def __setattr__(self, name, value):
        if not (isinstance(value, ModuleType) and _HOMES.get(name)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    value = getattr(import_module(f".{home}", __name__), name) if home else import_module(f".{name}", __name__)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOMES})
