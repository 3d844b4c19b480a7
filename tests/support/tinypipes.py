"""Tiny pipelines with random weights, one of each kind: built in under a second, 32 x 32 pixels, 8 x 8 latents."""

from __future__ import annotations

import copy
import functools
import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stamina_fast.tiny.pipeline import build_tokenizer

PIXELS, LATENT, WIDTH = 32, 8, 32
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@functools.cache
def _vocabulary():
    """The small model's words with ids in alphabetical order: the trainer of vocabularies numbers ties as it likes."""
    built = build_tokenizer()
    specials = [built.bos_token, built.eos_token]
    words = sorted(set(built.get_vocab()) - set(specials)) + specials
    merges = json.loads(built.backend_tokenizer.to_str())["model"]["merges"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[tuple(pair) for pair in merges], unk_token=built.unk_token,
        bos_token=built.bos_token, eos_token=built.eos_token, pad_token=built.pad_token,
        model_max_length=built.model_max_length,
    )


def tokenizer():
    """A fresh tokenizer each time, since adding a token changes it."""
    return copy.deepcopy(_vocabulary())


def text_encoder(tok, kind=CLIPTextModel, width=WIDTH, activation="quick_gelu", eos_token_id=None):
    return kind(CLIPTextConfig(
        vocab_size=len(tok), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tok.model_max_length, projection_dim=width, hidden_act=activation,
        bos_token_id=tok.bos_token_id, eos_token_id=eos_token_id or tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )).eval()


def vae(**config):
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16, 16), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8,
        sample_size=PIXELS, mid_block_add_attention=False, **config,
    ).eval()


def unet(**config):
    return UNet2DConditionModel(**{
        "sample_size": LATENT, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH, "attention_head_dim": 2, "norm_num_groups": 8, **config,
    }).eval()


def sd15(seed: int = 0) -> StableDiffusionPipeline:
    """Epsilon prediction, one text encoder, PNDM, as Stable Diffusion 1.5."""
    torch.manual_seed(seed)
    tok = tokenizer()
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(tok), tokenizer=tok, unet=unet(),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def narrow() -> StableDiffusionPipeline:
    """`sd15` with a single cross-attention layer, for backends that are slow here."""
    pipeline = sd15()
    pipeline.unet = unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    return pipeline


def sd21(seed: int = 0, zero_snr: bool = False) -> StableDiffusionPipeline:
    """v-prediction, linear projections, heads by level, as Stable Diffusion 2.1."""
    torch.manual_seed(seed)
    tok = tokenizer()
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr=zero_snr,
                              steps_offset=1, timestep_spacing="trailing", **BETAS)
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(tok, activation="gelu"), tokenizer=tok,
        unet=unet(use_linear_projection=True, attention_head_dim=(2, 4)), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """Two tokenizers and text encoders with the old end-of-text id, pooled embeddings, time ids, an fp32 VAE, as SDXL."""
    torch.manual_seed(seed)
    tok, tok_2 = tokenizer(), tokenizer()
    denoiser = unet(
        cross_attention_dim=2 * WIDTH, use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=True), text_encoder=text_encoder(tok, eos_token_id=2),
        tokenizer=tok, tokenizer_2=tok_2,
        text_encoder_2=text_encoder(tok_2, CLIPTextModelWithProjection, activation="gelu", eos_token_id=2),
        unet=denoiser, scheduler=EulerDiscreteScheduler(**BETAS), add_watermarker=False,
    )


KINDS = {"sd15": sd15, "sd21": sd21, "sdxl": sdxl}
