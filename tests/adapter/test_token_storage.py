"""Tokens that are stored: added again, and read by plain diffusers, to the bit."""

import json

import pytest
import tinypipes
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from tokenbanks import KINDS, bank_of, parts, states, tables

from stamina_fast.errors import InputError


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_stored_tokens_are_added_again_with_the_same_ids(kind):
    first = KINDS[kind]()
    bank = bank_of(first)
    for i, token in enumerate(("<one>", "<two>")):
        bank.begin(token, seed=i)
        bank.fold_()
    second = KINDS[kind]()
    again = bank_of(second)
    for token, vectors in bank.tokens.items():
        again.add(token, vectors)
    assert all(torch.equal(table, tables(first)[name]) for name, table in tables(second).items())
    assert torch.equal(states(first, "<two> left of <one>"), states(second, "<two> left of <one>"))
    # and the third one is the same in both
    for b in (bank, again):
        b.begin("<three>", seed=5)
        b.fold_()
    assert all(torch.equal(table, tables(first)[name]) for name, table in tables(second).items())


@pytest.mark.parametrize("embeddings", [
    {}, {"text_encoder": torch.zeros(5)}, {"text_encoder": torch.full((tinypipes.WIDTH,), float("nan"))},
    {"text_encoder": torch.zeros(tinypipes.WIDTH), "text_encoder_2": torch.zeros(tinypipes.WIDTH)},
])
def test_embeddings_that_do_not_fit_are_refused(embeddings):
    pipeline = tinypipes.sd15()
    bank = bank_of(pipeline)
    with pytest.raises(InputError, match="must be finite, of shapes"):
        bank.add("<one>", embeddings)
    assert "<one>" not in pipeline.tokenizer.get_vocab()


@pytest.mark.parametrize(("kind", "cls"), [("sd15", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)])
def test_plain_diffusers_loads_tokens_to_the_bit(kind, cls, tmp_path):
    pipeline = KINDS[kind]()
    bank = bank_of(pipeline)
    for i, token in enumerate(("<one>", "v*")):
        bank.begin(token, seed=i)
        bank.fold_()
    bank.detach()
    pipeline.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, local_files_only=True)
    for (name, encoder, tokenizer), (_, _, ours) in zip(parts(loaded), parts(pipeline), strict=True):
        assert torch.equal(encoder.get_input_embeddings().weight, tables(pipeline)[name])
        for token, vectors in bank.tokens.items():
            assert tokenizer(f"a photo of {token}").input_ids == ours(f"a photo of {token}").input_ids
            assert torch.equal(encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)], vectors[name])
    assert torch.equal(states(loaded, "a photo of <one>"), states(pipeline, "a photo of <one>"))
    assert "stamina" not in json.dumps(loaded.config, default=str)


def test_a_token_is_a_textual_inversion_file(tmp_path):
    pipeline = tinypipes.sd15()
    bank = bank_of(pipeline)
    bank.begin("<one>")
    vector = bank.fold_()["text_encoder"]
    save_file({"<one>": vector}, tmp_path / "one.safetensors")
    plain = tinypipes.sd15()
    plain.load_textual_inversion(str(tmp_path / "one.safetensors"))
    assert torch.equal(tables(plain)["text_encoder"], tables(pipeline)["text_encoder"])
    assert torch.equal(states(plain, "a photo of <one>"), states(pipeline, "a photo of <one>"))
