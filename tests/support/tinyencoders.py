"""A tiny CLIP and a tiny DINOv2 with random weights, in folders as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import tinypipes
import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

PROCESSOR = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_resize": True, "do_center_crop": True,
             "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True,
             "rescale_factor": 1 / 255, "resample": 3, "do_convert_rgb": True}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def _processor(folder: Path, kind: str) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "image_processor_type": kind}))
    return folder


def clip(folder: Path) -> Path:
    """A CLIP with the tokenizer of the tiny pipelines."""
    torch.manual_seed(0)
    tokenizer = tinypipes.tokenizer()
    text = {**SMALL, "intermediate_size": 64, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": tokenizer.model_max_length}
    vision = {**SMALL, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _processor(folder, "CLIPImageProcessor")


def dino(folder: Path) -> Path:
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL, image_size=32, patch_size=8)).save_pretrained(folder)
    return _processor(folder, "BitImageProcessor")
