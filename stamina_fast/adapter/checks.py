"""Checks that projections can carry adapters; each raises one line with the remedy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import InputError
from ..ops.functional import FLOATS
from ..pipeline.projections import check_offload, check_processors
from .config import StaminaConfig
from .masks import MASKS
from .stack import StackedLinear


def check_projections(unet: nn.Module, slots: Mapping[str, nn.Module], config: StaminaConfig) -> None:
    """Raise InputError, with the remedy, where these projections cannot carry adapters."""
    if not slots:
        raise InputError(f"{type(unet).__name__} has no cross-attention on text; attach needs a text-conditioned U-Net")
    for name, slot in slots.items():
        if isinstance(slot, StackedLinear):
            raise InputError("this U-Net already has adapters attached; call detach() on them first")
        if type(slot) is not nn.Linear:
            raise InputError(
                f"{name} must be a plain torch.nn.Linear, got {type(slot).__module__}.{type(slot).__name__}; "
                "unload LoRA or other adapter layers first (pipeline.unload_lora_weights()), and load without quantization"
            )
        if slot.weight.dtype not in FLOATS:
            raise InputError(f"{name}.weight must be floating point, got {slot.weight.dtype}; load without quantization")
        if slot.weight.is_inference():
            raise InputError(f"{name}.weight was made under torch.inference_mode; load it outside")
    smallest = min(min(slot.weight.shape) for slot in slots.values())
    for option in ("rank", "gate_rank"):
        value = getattr(config, option)
        counts = MASKS[config.mask].ranked if option == "gate_rank" else config.residual == "low-rank"
        if counts and value > smallest:
            raise InputError(f"{option} must be at most the smallest projection width, {smallest}, got {value}; lower {option}")
    for module in unet.modules():
        check_offload(module)
    check_processors(unet.modules())
