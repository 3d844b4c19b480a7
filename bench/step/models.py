"""The models that a step is timed with: their real configurations and random weights, so that nothing is downloaded.

The values are those of unet/, vae/, text_encoder*/ and scheduler/ in the diffusers folders named in `source`; what a
configuration leaves out is the default of its class. tests/bench/test_bench_step.py checks the counts of parameters.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import nn

from stamina_fast.errors import InputError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
OPENCLIP_H = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "projection_dim": 512,
    "hidden_act": "gelu",
}
OPENCLIP_BIG_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280,
    "hidden_act": "gelu",
}


@dataclass(frozen=True)
class Model:
    """Configurations of the parts of a pipeline; `pixels` is the side of the pictures that it is trained at here."""

    source: str
    pixels: int
    unet: dict
    texts: tuple[dict, ...]
    vae: dict = field(default_factory=dict)
    scheduler: dict = field(default_factory=dict)
    vocabulary: int = 49_408
    length: int = 77

    @property
    def double(self) -> bool:
        return len(self.texts) == 2


MODELS = {
    "sd15": Model(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", 512,
        unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        texts=(CLIP_L,), vae=VAE | {"sample_size": 512},
    ),
    "sd21": Model(
        "stabilityai/stable-diffusion-2-1", 768,
        unet={"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
              "use_linear_projection": True},
        texts=(OPENCLIP_H,), vae=VAE | {"sample_size": 768}, scheduler={"prediction_type": "v_prediction"},
    ),
    "sdxl": Model(
        "stabilityai/stable-diffusion-xl-base-1.0", 1024,
        unet={
            "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        texts=(CLIP_L, OPENCLIP_BIG_G), vae=VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    ),
}


@cache
def tokenizer(size: int, length: int):
    """A tokenizer of `size` entries that spells every word: the lengths, and so the work, are the real one's.

    Raises InputError where the letters do not fit.
    """
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    known = [*letters, *(f"{letter}</w>" for letter in letters)]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    if size < len(known) + len(specials):
        raise InputError(f"the vocabulary must have at least {len(known) + len(specials)} entries, got {size}")
    known += [f"{index}-piece" for index in range(size - len(known) - len(specials))]
    vocabulary = {entry: index for index, entry in enumerate(known + specials)}
    start, end = specials
    return CLIPTokenizer(vocab=vocabulary, merges=[], unk_token=end, bos_token=start, eos_token=end, pad_token=end,
                         model_max_length=length)


def build(model: Model, device: str, dtype: torch.dtype, seed: int = 0):
    """A pipeline of this configuration with random weights, on `device` in `dtype`, frozen and in inference mode."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)

    def frozen(make, *arguments, **options) -> nn.Module:
        with torch.device(device):
            module = make(*arguments, **options)
        # plain Module.to: that of diffusers keeps some modules in fp32
        return nn.Module.to(module, device, dtype).requires_grad_(False).eval()

    def text(config: dict, kind) -> nn.Module:
        return frozen(kind, CLIPTextConfig(
            vocab_size=model.vocabulary, max_position_embeddings=model.length, bos_token_id=model.vocabulary - 2,
            eos_token_id=model.vocabulary - 1, pad_token_id=model.vocabulary - 1, **config,
        ))

    parts = {
        "unet": frozen(UNet2DConditionModel, **model.unet), "vae": frozen(AutoencoderKL, **model.vae),
        "scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **BETAS | model.scheduler),
        "text_encoder": text(model.texts[0], CLIPTextModel),
        "tokenizer": copy.deepcopy(tokenizer(model.vocabulary, model.length)),
    }
    if not model.double:
        return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionXLPipeline(
        **parts, text_encoder_2=text(model.texts[1], CLIPTextModelWithProjection),
        tokenizer_2=copy.deepcopy(tokenizer(model.vocabulary, model.length)), add_watermarker=False,
    )


def sharing(pipeline):
    """Another pipeline over the memory of this one, so that each arm can change modules and parameters for itself.

    The VAE is the very same module, since no arm changes it.
    """
    def own(part):
        if not isinstance(part, nn.Module):
            return copy.deepcopy(part)
        shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in part.parameters()}
        return copy.deepcopy(part, shared | {id(buffer): buffer for buffer in part.buffers()})

    parts = {name: part if name == "vae" else own(part) for name, part in pipeline.components.items()}
    options = {"add_watermarker": False} if "text_encoder_2" in parts else {"requires_safety_checker": False}
    return type(pipeline)(**parts, **options)


def counted(pipeline) -> dict[str, int]:
    """{part: parameters} of its networks."""
    return {
        name: sum(p.numel() for p in part.parameters())
        for name, part in pipeline.components.items() if isinstance(part, nn.Module)
    }


def networks(pipeline) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
