"""Attached to a pipeline, adapters bring the concept's token."""

import dataclasses

import pytest
import tinypipes
import torch
from unets import SMALL, train_

import stamina_fast as sf


@pytest.mark.parametrize("kind", tinypipes.KINDS)
def test_a_pipeline_brings_its_token(kind):
    pipeline = tinypipes.KINDS[kind]()
    adapters = sf.attach(pipeline, SMALL)
    bank = adapters.tokens
    objects = {name: id(p) for name, p in adapters.named_parameters()}
    tokens = {name: value for name, value in objects.items() if name.startswith("tokens.")}
    assert sorted(tokens.values()) == sorted(id(p) for p in bank.parameters())
    assert len(tokens) < len(objects) == len(list(adapters.parameters()))
    bank.begin("<cat>", seed=1)
    train_(adapters)
    state = adapters.state_dict()
    assert set(tokens) <= set(state)
    embeddings = adapters.fold_("cat")
    assert bank.active is None
    assert set(embeddings) == {"text_encoder", "text_encoder_2"} & set(pipeline.components)
    assert {name: id(p) for name, p in adapters.named_parameters()} == objects
    adapters.load_state_dict(state)
    adapters.detach()
    tokenizer, table = pipeline.tokenizer, pipeline.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(table[tokenizer.convert_tokens_to_ids("<cat>")], embeddings["text_encoder"])


def test_a_token_may_be_a_row_and_a_pipeline_that_refuses_one_stays_plain():
    pipeline = tinypipes.sd15()
    adapters = sf.attach(pipeline, dataclasses.replace(SMALL, token_mlp=False, token_init="mean"))
    assert [p.ndim for p in adapters.tokens.parameters()] == [1]
    adapters.detach()
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match="text encoder"):
        sf.attach(pipeline, SMALL)
    sf.attach(pipeline.unet, SMALL).detach()
