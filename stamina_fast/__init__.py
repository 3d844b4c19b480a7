"""STAMINA's masked low-rank residuals W + M ⊙ (A B), fused with the K/V projections of a U-Net."""

from . import reference
from .attach import Adapters, attach
from .config import StaminaConfig
from .dispatch import backends, launches
from .errors import StaminaError
from .functional import fold_, gate_mask, gate_penalties, gate_uniforms, masked_linear, rebuild_
from .noise import GateNoise
from .train import TrainOptions, train

__version__ = "0.1.0"

__all__ = [
    "Adapters",
    "GateNoise",
    "StaminaConfig",
    "StaminaError",
    "TrainOptions",
    "attach",
    "backends",
    "fold_",
    "gate_mask",
    "gate_penalties",
    "gate_uniforms",
    "launches",
    "masked_linear",
    "rebuild_",
    "reference",
    "train",
]
