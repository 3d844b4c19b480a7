"""Sampling: a picture is a function of its seed alone, an unknown token is an error, and cached projections change no bit."""

import copy
import weakref
from collections import Counter

import pytest
import tinypipes
import torch
from torch import nn
from typer.testing import CliRunner

from stamina_fast import StaminaConfig, attach
from stamina_fast.cli import app
from stamina_fast.errors import InputError
from stamina_fast.pipeline.projections import find_projections
from stamina_fast.pipeline.sampling import cached_projections, sample, to_pil


@pytest.mark.parametrize("kind", tinypipes.KINDS)
def test_batch_and_count_change_no_picture(kind):
    pipeline = tinypipes.KINDS[kind]()
    once = sample(pipeline, "a photo of a cat", 4, seed=3, guidance=2.0, steps=2, batch=4)
    split = sample(pipeline, "a photo of a cat", 3, seed=3, guidance=2.0, steps=2, batch=2)
    assert once.shape == (4, 3, 32, 32)
    assert once.dtype == torch.float32
    assert 0 <= once.min() <= once.max() <= 1
    torch.testing.assert_close(once[:3], split, rtol=0, atol=1e-4)
    assert not torch.allclose(once[0], once[1], atol=1e-2)
    assert not torch.equal(once, sample(pipeline, "a photo of a cat", 4, seed=4, guidance=2.0, steps=2))


def test_unknown_token_is_named():
    pipeline = tinypipes.sd15()
    pipeline.tokenizer.add_tokens(["<cat>"])
    with pytest.raises(InputError, match=r"<dog>.*it knows <cat>"):
        sample(pipeline, "<cat> and <dog>", 1)
    assert sample(pipeline, "a <cat>", 0).shape[0] == 0


def test_pictures_for_pil():
    pictures = to_pil(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 6))
    assert [p.size for p in pictures] == [(6, 4)] * 2
    assert pictures[0].getpixel((0, 0)) == (0, 128, 255)


@pytest.fixture
def products(monkeypatch):
    """How often each module has computed the product of a Linear."""
    counts, original = Counter(), nn.Linear.forward

    def forward(module, x):
        counts[module] += 1
        return original(module, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return counts


def projected():
    """A pipeline of which the U-Net itself projects the text states, from half its width."""
    pipeline = tinypipes.sd15()
    pipeline.unet = tinypipes.unet(cross_attention_dim=16, encoder_hid_dim=tinypipes.WIDTH, encoder_hid_dim_type="text_proj")
    return pipeline


CACHED = {**tinypipes.KINDS, "projected": projected}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", CACHED)
def test_cached_projections_change_no_bit_and_are_computed_once(kind, guidance, products):
    pipeline = CACHED[kind]()
    slots = [*find_projections(pipeline.unet).values()]
    options = {"guidance": guidance, "steps": 3, "batch": 2}
    for prompt in ("a photo of a cat", "a red ball on grass"):
        products.clear()
        plain = sample(pipeline, prompt, 3, **options)
        steps = products[slots[0]]
        assert steps >= 2 * 3
        products.clear()
        assert torch.equal(sample(pipeline, prompt, 3, **options, cache_projections=True), plain)
        # once for each of the two batches
        assert {products[slot] for slot in slots} == {2}
        if kind == "projected":
            assert products[pipeline.unet.encoder_hid_proj] == 2


def call(pipeline, states):
    """One prediction of the U-Net for text states [1, 77, k]."""
    with torch.no_grad():
        return pipeline.unet(torch.ones(1, 4, 8, 8), 500, states).sample


def states_of(pipeline, prompt):
    return pipeline.encode_prompt(prompt, "cpu", 1, False)[0]


def test_other_prompts_are_told_apart_and_only_two_are_kept(products):
    pipeline = tinypipes.sd15()
    slot = next(iter(find_projections(pipeline.unet).values()))
    prompts = ("a cat", "a red ball", "grass", "a cat")
    plain = [call(pipeline, states_of(pipeline, prompt)) for prompt in prompts]
    assert not torch.equal(plain[0], plain[1])
    with cached_projections(pipeline):
        known = slot.known
        for _ in range(2):
            for prompt, wanted in zip(prompts, plain, strict=True):
                assert torch.equal(call(pipeline, states_of(pipeline, prompt)), wanted)
                assert len(known.states) <= 2
        # two in turn, as where guidance is a forward of its own
        both = [states_of(pipeline, prompt) for prompt in prompts[:2]]
        products.clear()
        for _ in range(3):
            for states, wanted in zip(both, plain, strict=False):
                assert torch.equal(call(pipeline, states), wanted)
        assert products[slot] == 2
        gone = weakref.ref(both[0])
        del both, states
        for prompt in prompts[1:3]:
            call(pipeline, states_of(pipeline, prompt))
        assert gone() is None


def write_states(pipeline, states):
    states.mul_(1.5)


def write_weight(pipeline, states):
    with torch.no_grad():
        next(iter(find_projections(pipeline.unet).values())).weight.mul_(1.5)


def replace_weight(pipeline, states):
    slot = next(iter(find_projections(pipeline.unet).values()))
    slot.weight.data = slot.weight.data * 1.5


def load_weights(pipeline, states):
    pipeline.unet.load_state_dict({name: tensor * 1.25 for name, tensor in pipeline.unet.state_dict().items()})


def round_weights(pipeline, states):
    pipeline.unet.to(torch.bfloat16)
    pipeline.unet.to(torch.float32)


def replace_states(pipeline, states):
    states.data = states.data * 1.5
    states.add_(0)


@pytest.mark.parametrize("change", [write_states, write_weight, replace_weight, load_weights, round_weights, replace_states])
def test_what_is_written_is_seen(change):
    pipeline = tinypipes.sd15()
    states = states_of(pipeline, "a cat").clone()
    with cached_projections(pipeline):
        before = call(pipeline, states)
        assert torch.equal(call(pipeline, states), before)
        change(pipeline, states)
        after = call(pipeline, states)
    assert torch.equal(after, call(pipeline, states))
    assert not torch.equal(after, before)


def test_a_result_that_somebody_writes_to_is_made_anew():
    pipeline = tinypipes.sd15()
    slot = next(iter(find_projections(pipeline.unet).values()))
    states = states_of(pipeline, "a cat")
    with torch.no_grad(), cached_projections(pipeline):
        wanted = slot(states).clone()
        slot(states).zero_()
        assert torch.equal(slot(states), wanted)


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_where_writes_or_casts_are_not_seen_nothing_is_kept(around, products):
    pipeline = tinypipes.sd15()
    slot = next(iter(find_projections(pipeline.unet).values()))
    states = states_of(pipeline, "a cat")
    with around():
        wanted = call(pipeline, states)
        products.clear()
        with cached_projections(pipeline):
            assert torch.equal(call(pipeline, states), wanted)
            assert torch.equal(call(pipeline, states), wanted)
            assert not slot.known.states
    assert products[slot] == 2


def test_gradients_pass_through_cached_projections():
    pipeline = tinypipes.sd15()
    states = states_of(pipeline, "a cat").detach().requires_grad_()
    with cached_projections(pipeline):
        for _ in range(2):
            pipeline.unet(torch.ones(1, 4, 8, 8), 500, states).sample.sum().backward()
    assert states.grad.abs().sum() > 0


def test_everything_is_as_before_when_the_block_ends():
    pipeline = tinypipes.sd15()
    modules = list(pipeline.unet.modules())
    before = [(type(module), set(vars(module))) for module in modules]
    with pytest.raises(RuntimeError, match="leave `cached_projections`"), cached_projections(pipeline):
        copy.deepcopy(pipeline.unet)
    assert [(type(module), set(vars(module))) for module in modules] == before
    copy.deepcopy(pipeline.unet)


def test_adapters_and_the_cache_refuse_one_another():
    pipeline = tinypipes.sd15()
    with cached_projections(pipeline), pytest.raises(InputError, match="CachedLinear"):
        attach(pipeline, StaminaConfig(rank=2, gate_rank=2))
    with cached_projections(pipeline), pytest.raises(InputError, match="CachedLinear"), cached_projections(pipeline):
        pass
    plain = sample(pipeline, "a cat", 1, steps=2)
    adapters = attach(pipeline, StaminaConfig(rank=2, gate_rank=2, density=0.9))
    with pytest.raises(InputError, match="detach the adapters"):
        sample(pipeline, "a cat", 1, steps=2, cache_projections=True)
    with torch.no_grad():
        adapters.stacks[0].a.normal_()
    adapters.fold_("one")
    adapters.detach()
    folded = sample(pipeline, "a cat", 1, steps=2)
    assert not torch.equal(folded, plain)
    assert torch.equal(sample(pipeline, "a cat", 1, steps=2, cache_projections=True), folded)


def test_the_command_line_draws_the_same_pictures(tmp_path):
    tinypipes.sd15().save_pretrained(tmp_path / "model")
    for name, more in (("plain", ()), ("cached", ("--cache",))):
        options = ("--prompt", "a cat", "--count", "2", "--steps", "2", "--device", "cpu", "--output", str(tmp_path / name))
        result = CliRunner().invoke(app, ["sample", str(tmp_path / "model"), *options, *more])
        assert result.exit_code == 0, result.output + repr(result.exception)
    for picture in ("0000.png", "0001.png"):
        assert (tmp_path / "plain" / picture).read_bytes() == (tmp_path / "cached" / picture).read_bytes()
