"""The modules of a U-Net that project the text states, and checks that diffusers does not bypass or move them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import InputError

STATES = "encoder_hidden_states"


def find_projections(unet: nn.Module) -> dict[str, nn.Module]:
    """The modules that project text states, by name, in the order of the model: for each attention K, then V."""
    found = {}
    for name, module in unet.named_modules():
        if getattr(module, "added_kv_proj_dim", None) is not None:
            # self-attention with extra projections for the text
            pair = ("add_k_proj", "add_v_proj")
        elif getattr(module, "is_cross_attention", False):
            pair = ("to_k", "to_v")
        else:
            continue
        found |= {f"{name}.{kind}": getattr(module, kind) for kind in pair}
    return found


def check_offload(module: nn.Module) -> None:
    """Raise InputError if weights are moved or cast during the forward, since they would stop being views of one matrix."""
    hooks = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})
    if "_hf_hook" in module.__dict__ or any("offloading" in name or "layerwise_casting" in name for name in hooks):
        raise InputError(
            "adapters cannot follow weights that are offloaded or cast during the forward; call "
            "pipeline.remove_all_hooks() and .to(device), or detach the adapters before offloading"
        )


def check_processors(modules: Iterable[nn.Module]) -> None:
    """Raise InputError if an attention processor does not call to_k and to_v, since the residual would be dropped."""
    for module in modules:
        processor = getattr(module, "processor", None)
        if type(processor).__name__.startswith("Fused") or hasattr(processor, "to_k_custom_diffusion"):
            raise InputError(
                f"{type(processor).__name__} bypasses to_k and to_v and would drop the adapters; "
                "call unet.unfuse_qkv_projections() or unet.set_default_attn_processor(), or detach the adapters first"
            )


def text_projection(unet: nn.Module) -> nn.Module | None:
    """The U-Net's own module that maps the text states before K and V see them, or None."""
    inner = getattr(unet, "text_encoder_hid_proj", None)
    kind = getattr(getattr(unet, "config", None), "encoder_hid_dim_type", None)
    return unet.encoder_hid_proj if inner is None and kind in ("text_proj", "text_image_proj", "image_proj") else inner
