"""The shape of the small Stable Diffusion that ships with the package: 32 x 32 pixels, 16 x 16 x 6 latents."""

from __future__ import annotations

import json

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .world import vocabulary

PIXELS = 32
TEXT_LENGTH = 24
TEXT_WIDTH = 128
LATENT_CHANNELS = 6


def build_tokenizer() -> CLIPTokenizer:
    """A byte-pair vocabulary in which every word of the world is one token and any other text still has tokens.

    It is the same in every process: no two words are equally frequent, since the trainer breaks ties at random, and ids are in
    alphabetical order.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    words = vocabulary()
    bpe.train_from_iterator((word for i, word in enumerate(words) for _ in range(1000 + 37 * i)), trainer)
    model = json.loads(bpe.to_str())["model"]
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789-.,'"]
    pieces = {*model["vocab"], *letters, *(f"{letter}</w>" for letter in letters)}
    vocab = {piece: i for i, piece in enumerate([*sorted(pieces), start, end])}
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, unk_token=end, bos_token=start, eos_token=end, pad_token=end,
                         model_max_length=TEXT_LENGTH)


def build_vae() -> AutoencoderKL:
    # one halving only: a decoder with nearest-neighbour upsampling cannot tell the pixels of larger cells apart
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, block_out_channels=(24, 48), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
        sample_size=PIXELS, mid_block_add_attention=False,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=3 * TEXT_WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))


def build_unet() -> UNet2DConditionModel:
    widths = (32, 96, 160)
    return UNet2DConditionModel(
        sample_size=PIXELS // 2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=widths,
        # cross-attention at the finest latents too, as in Stable Diffusion, since a concept changes only K and V
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        # the number of heads: 32 channels each
        attention_head_dim=tuple(w // 32 for w in widths), norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    # no signal is left at the last step, so that colours of whole pictures are learned. This needs v-prediction
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False,
        rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True,
        steps_offset=1,
    )


def build_pipeline(tokenizer: CLIPTokenizer | None = None) -> StableDiffusionPipeline:
    """The whole pipeline with fresh fp32 weights on the CPU. It gets a tokenizer of its own unless one is given."""
    tokenizer = tokenizer or build_tokenizer()
    return StableDiffusionPipeline(
        vae=build_vae(), text_encoder=build_text_encoder(tokenizer), tokenizer=tokenizer, unet=build_unet(),
        scheduler=build_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
