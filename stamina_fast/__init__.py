"""STAMINA's masked low-rank residuals W + M ⊙ (A B), fused with the K/V projections of a U-Net."""

from importlib import import_module

__version__ = "0.1.0"

# each public name and the module that has it, imported when the name is first asked for: the operators need torch alone
_HOMES = {
    "Adapters": "adapter.attach",
    "GateNoise": "ops.noise",
    "StaminaConfig": "adapter.config",
    "StaminaError": "errors",
    "TrainOptions": "training",
    "attach": "adapter.attach",
    "backends": "ops.dispatch",
    "fold_": "ops.functional",
    "gate_mask": "ops.functional",
    "gate_penalties": "ops.functional",
    "gate_uniforms": "ops.functional",
    "launches": "ops.dispatch",
    "masked_linear": "ops.functional",
    "rebuild_": "ops.functional",
    "reference": "ops.reference",
    "train": "training",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f".{_HOMES[name]}", __name__)
    # the specification is a module itself
    value = home if name == "reference" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOMES})
