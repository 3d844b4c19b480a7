"""While adapters are attached the rest of the model is frozen, and afterwards it is as trainable as it was."""

import types

import pytest
import tinypipes
import torch
from unets import SMALL, attached, bits, inputs, same_bits, train_, unet

import stamina_fast as sf
from stamina_fast.adapter import attach
from stamina_fast.adapter.stack import Stack
from stamina_fast.pipeline.load import frozen, modules_of
from stamina_fast.pipeline.projections import find_projections


def flags(modules) -> dict[str, bool]:
    return {f"{i}.{name}": p.requires_grad for i, module in enumerate(modules) for name, p in module.named_parameters()}


def mix(module) -> None:
    """Freeze every third parameter, so that no single rule describes the flags."""
    for i, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(i % 3 > 0)


def loss_of(pipeline, prompt: str) -> torch.Tensor:
    """A denoising loss of one step, from the prompt's ids to the U-Net's output."""
    ids = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    states, added = pipeline.text_encoder(ids, output_hidden_states=True), None
    x = states[0]
    if hasattr(pipeline, "text_encoder_2"):
        second = pipeline.text_encoder_2(ids, output_hidden_states=True)
        x = torch.cat([states.hidden_states[-2], second.hidden_states[-2]], -1)
        added = {"text_embeds": second[0], "time_ids": torch.ones(1, 6)}
    noisy = torch.randn(1, 4, tinypipes.LATENT, tinypipes.LATENT, generator=torch.Generator().manual_seed(0))
    return pipeline.unet(noisy, torch.tensor(5), x, added_cond_kwargs=added).sample.square().mean()


def test_a_u_net_is_frozen_and_gets_its_mixed_flags_back():
    model = unet()
    mix(model)
    before = flags([model])
    assert {True, False} == set(before.values())
    for _ in range(2):
        adapters = sf.attach(model, SMALL)
        assert not any(flags([model]).values())
        assert all(p.requires_grad for p in adapters.parameters())
        # what somebody asks for in between is no part of what was there before
        model.conv_in.requires_grad_(True)
        adapters.detach()
        assert flags([model]) == before


def test_a_frozen_u_net_stays_frozen():
    model = unet().requires_grad_(False)
    sf.attach(model, SMALL).detach()
    assert not any(flags([model]).values())


def test_an_attach_that_fails_leaves_the_model_as_it_was(monkeypatch):
    """With projections of two widths, the second stack runs out of memory."""
    model = unet(cross_attention_dim=(32, 16))
    mix(model)
    before, weights = flags([model]), bits(model)
    made = []

    class Failing(Stack):
        def __init__(self, *arguments):
            if made:
                raise torch.OutOfMemoryError("no memory")
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(attach, "Stack", Failing)
    with pytest.raises(torch.OutOfMemoryError):
        sf.attach(model, SMALL)
    assert made
    assert flags([model]) == before
    assert same_bits(bits(model), weights)
    assert {type(slot) for slot in find_projections(model).values()} == {torch.nn.Linear}
    monkeypatch.undo()
    sf.attach(model, SMALL).detach()


@pytest.mark.parametrize("kind", tinypipes.KINDS)
def test_a_step_leaves_no_gradient_on_a_pipeline_and_reaches_the_token(kind):
    pipeline = tinypipes.KINDS[kind]()
    modules = modules_of(pipeline)
    assert {id(pipeline.unet), id(pipeline.vae), id(pipeline.text_encoder)} <= {id(module) for module in modules}
    for module in modules:
        mix(module)
    before = flags(modules)
    adapters = sf.attach(pipeline, SMALL)
    assert not any(flags(modules).values())
    # a token makes the table a new parameter, with a row more
    adapters.tokens.begin("<cat>")
    train_(adapters, scale=0.1)
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.1)
    untouched = [bits(module) for module in modules]
    values = [p.detach().clone() for p in adapters.parameters()]
    loss_of(pipeline, "a photo of <cat>").backward()
    assert all(p.grad is None for module in modules for p in module.parameters())
    assert all(p.grad is not None and p.grad.any() for p in adapters.tokens.parameters())
    optimizer.step()
    assert all(same_bits(bits(module), old) for module, old in zip(modules, untouched, strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(adapters.stacks.parameters(), values, strict=False))
    adapters.fold_("cat")
    adapters.detach()
    assert flags(modules) == before


def test_gradient_checkpointing_reaches_token_and_factors():
    found = []
    for checkpointing in (False, True):
        pipeline = tinypipes.sd15()
        adapters = sf.attach(pipeline, SMALL)
        adapters.tokens.begin("<cat>")
        train_(adapters, scale=0.1)
        pipeline.unet.train()
        if checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        loss_of(pipeline, "a photo of <cat>").backward()
        found.append([p.grad for p in adapters.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_parameters_replaced_while_attached_get_the_flags_of_their_names():
    model = unet()
    mix(model)
    before = flags([model])
    adapters = sf.attach(model, SMALL)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    model(*inputs()).sample.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    adapters.detach()
    assert flags([model]) == before


def test_what_looks_like_a_pipeline_is_frozen_by_its_attributes():
    whole = tinypipes.sd15()
    parts = types.SimpleNamespace(unet=whole.unet, text_encoder=whole.text_encoder, tokenizer=whole.tokenizer)
    adapters = sf.attach(parts, SMALL)
    assert not any(flags([parts.unet, parts.text_encoder]).values())
    assert all(flags([whole.vae]).values())
    adapters.detach()
    assert all(flags(modules_of(whole)).values())


def test_a_refused_attach_freezes_nothing():
    pipeline = tinypipes.sd15()
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match="text encoder"):
        sf.attach(pipeline, SMALL)
    model, _ = attached()
    model.conv_in.requires_grad_(True)
    with pytest.raises(ValueError, match="already has adapters"):
        sf.attach(model, SMALL)
    assert all(flags([pipeline.unet, pipeline.vae]).values())
    assert model.conv_in.weight.requires_grad


def test_a_pipeline_frozen_for_a_block_gets_flags_and_modes_back():
    pipeline = tinypipes.sd15()
    with torch.inference_mode():
        pipeline.vae = tinypipes.vae()
    modules = modules_of(pipeline)
    mix(pipeline.unet)
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    before, modes = flags(modules), [part.training for module in modules for part in module.modules()]
    with frozen(pipeline):
        assert not any(flags(modules).values())
        assert not any(part.training for module in modules for part in module.modules())
        pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer) + 3, mean_resizing=False)
    assert flags(modules) == before
    assert [part.training for module in modules for part in module.modules()] == modes
