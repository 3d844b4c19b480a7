"""Token banks on tiny pipelines, and what can be read off them."""

import dataclasses

import tinypipes
import torch
from diffusers.loaders import TextualInversionLoaderMixin

from stamina_fast.adapter.config import StaminaConfig
from stamina_fast.adapter.tokens import TokenBank
from stamina_fast.tiny.pipeline import build_pipeline

CONFIG = StaminaConfig(token_width=16, token_input_width=8)
KINDS = {"sd15": tinypipes.sd15, "sdxl": tinypipes.sdxl, "own": build_pipeline}
PAIRS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def parts(pipeline):
    """(name, text encoder, tokenizer) of each text encoder."""
    return [(name, getattr(pipeline, name), getattr(pipeline, tok)) for name, tok in PAIRS.items() if hasattr(pipeline, name)]


def bank_of(pipeline, vectors=1, **options):
    for _, encoder, _ in parts(pipeline):
        encoder.requires_grad_(False)
    return TokenBank(pipeline, dataclasses.replace(CONFIG, token_vectors=vectors), **options)


def tables(pipeline):
    return {name: encoder.get_input_embeddings().weight.detach().clone() for name, encoder, _ in parts(pipeline)}


def vocabularies(pipeline):
    probe = "a <one> and x<|endoftext|>y"
    return [(tok.get_vocab(), repr(tok.added_tokens_decoder), tok.tokenize(probe)) for _, _, tok in parts(pipeline)]


def states(pipeline, prompt):
    out = []
    for _, encoder, tokenizer in parts(pipeline):
        text = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
        ids = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        out.append(encoder(ids, output_hidden_states=True).hidden_states[-1])
    return torch.cat(out, -1)


def train(bank, pipeline, prompt, steps=3):
    optimizer = torch.optim.Adam(bank.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        states(pipeline, prompt).square().sum().backward()
        optimizer.step()
