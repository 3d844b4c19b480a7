"""One matrix, one operator call a step, and every way in which the text states could reach a projection."""

import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from unets import EVERY, SMALL, WIDTH, calls, effective, inputs, naive, train_, unet

import stamina_fast as sf
from stamina_fast.adapter.stack import SEEN

NOISE = sf.GateNoise(11, 3)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def pair(config=SMALL, trained=True, **options):
    """(a U-Net with adapters, its adapters, the same U-Net without)."""
    model, plain = unet(**options), unet(**options)
    adapters = sf.attach(model, config)
    if trained:
        train_(adapters)
    return model, adapters, plain


def gradients(adapters):
    return [parameter.grad.clone() for parameter in adapters.parameters()]


def forget(adapters):
    for parameter in adapters.parameters():
        parameter.grad = None


@pytest.mark.parametrize("noise", [None, NOISE])
@pytest.mark.parametrize("kind", EVERY)
def test_one_call_a_step_equals_a_u_net_with_those_weights(kind, noise):
    model, adapters, plain = pair(dataclasses.replace(EVERY[kind], density=0.6))
    adapters.noise = noise
    call, before = inputs(), calls()
    y = model(*call).sample
    assert calls() == before + 1
    # the noise of any other mask is part of its residual
    samples = noise if kind in ("learned-low-rank", "dense-logits") else None
    torch.testing.assert_close(y, naive(plain, adapters, call, samples), **EXACT)
    assert (y - plain(*call).sample).abs().max() > 1e-3


def test_states_by_keyword_and_by_position_are_the_same():
    model, _, _ = pair()
    sample, t, states = inputs()
    before = calls()
    by_keyword = model(sample, t, encoder_hidden_states=states, return_dict=False)[0]
    assert calls() == before + 1
    assert torch.equal(by_keyword, model(sample, t, states).sample)


def test_gradients_are_those_of_the_projections_one_by_one():
    model, adapters, plain = pair()
    sample, t, states = inputs()
    here, there = states.clone().requires_grad_(), states.clone().requires_grad_()
    stack = adapters.stacks[0]
    found = []
    for x, output in ((here, lambda x: model(sample, t, x).sample), (there, lambda x: naive(plain, adapters, (sample, t, x)))):
        output(x).square().sum().backward()
        found.append((x.grad, stack.a.grad.clone(), stack.b.grad.clone()))
        forget(adapters)
    # the naive mask has no gradient; what depends on the logits is compared below
    torch.testing.assert_close(*found, **EXACT)


def test_the_straight_through_gradient_passes_the_split():
    model, adapters, _ = pair()
    adapters.noise = NOISE
    _, _, states = inputs()
    attentions = [name.removesuffix(".to_k") for name in adapters.stacks[0].names if name.endswith(".to_k")]
    own = adapters._hook.hand_on(states)
    slots = [model.get_submodule(f"{name}.{kind}") for name in attentions for kind in ("to_k", "to_v")]
    sum(slot(own).square().sum() for slot in slots).backward()
    split = gradients(adapters)
    forget(adapters)
    arguments = adapters.arguments()[0]
    del arguments["names"]
    sf.masked_linear(states, **arguments).square().sum().backward()
    for one, two in zip(split, gradients(adapters), strict=True):
        torch.testing.assert_close(one, two, **EXACT)


@pytest.mark.parametrize("noise", [None, NOISE])
@pytest.mark.parametrize("kind", EVERY)
def test_a_tensor_the_hook_did_not_see_gets_its_own_right_result(kind, noise):
    model, adapters, _ = pair(EVERY[kind])
    adapters.noise = noise
    _, _, states = inputs()
    model(*inputs(seed=5))
    weights = effective(adapters.arguments()[0], adapters.arguments()[0]["noise"])
    for name in adapters.stacks[0].names:
        torch.testing.assert_close(model.get_submodule(name)(states), states @ weights[name].T, **EXACT)


def test_the_callers_tensor_is_left_alone():
    model, _, _ = pair()
    call = inputs()
    model(*call)
    assert not hasattr(call[2], SEEN)


@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)])
def test_stock_processors_use_the_one_call(processor):
    model, adapters, plain = pair()
    model.set_attn_processor(processor)
    before = calls()
    y = model(*inputs()).sample
    assert calls() == before + 1
    torch.testing.assert_close(y, naive(plain, adapters, inputs()), **EXACT)


def test_states_in_a_tuple_with_image_prompts():
    model, adapters, plain = pair()
    sample, t, states = inputs()
    image = torch.randn(2, 1, 4, WIDTH, dtype=torch.float64)
    for one in (model, plain):
        torch.manual_seed(3)
        one.set_attn_processor({
            name: IPAdapterAttnProcessor2_0(one.get_submodule(name.removesuffix(".processor")).to_q.in_features, WIDTH).double()
            if "attn2" in name else AttnProcessor2_0() for name in one.attn_processors
        })
    before = calls()
    y = model(sample, t, (states, [image])).sample
    assert calls() == before + 1
    torch.testing.assert_close(y, naive(plain, adapters, (sample, t, (states, [image]))), **EXACT)


def test_states_projected_inside_the_forward():
    model, adapters, plain = pair(encoder_hid_dim=24, encoder_hid_dim_type="text_proj")
    call, before = inputs(width=24), calls()
    y = model(*call).sample
    assert calls() == before + 1
    torch.testing.assert_close(y, naive(plain, adapters, call), **EXACT)


def test_a_projection_of_the_same_width_is_not_mistaken_for_states():
    model, adapters, plain = pair(encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj")
    before = calls()
    y = model(*inputs()).sample
    assert calls() == before + 1
    torch.testing.assert_close(y, naive(plain, adapters, inputs()), **EXACT)


def test_text_in_the_first_attention_too():
    model, adapters, plain = pair(only_cross_attention=(True, False))
    names = adapters.stacks[0].names
    assert sum(".attn1." in name for name in names) >= 4
    before = calls()
    y = model(*inputs()).sample
    assert calls() == before + 1
    torch.testing.assert_close(y, naive(plain, adapters, inputs()), **EXACT)


@pytest.mark.parametrize("norm", [None, "group_norm"])
def test_text_keys_added_to_self_attention(norm):
    """Here text has projections of its own; with a norm per layer every projection sees a tensor of its own."""
    model, adapters, plain = pair(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"), cross_attention_norm=norm,
    )
    assert {name.rpartition(".")[2] for name in adapters.stacks[0].names} == {"add_k_proj", "add_v_proj"}
    before = calls()
    y = model(*inputs()).sample
    assert calls() == before + 1 if norm is None else calls() > before + 1
    torch.testing.assert_close(y, naive(plain, adapters, inputs()), **EXACT)


def test_a_bias_is_kept():
    model, plain = unet(), unet()
    for one in (model, plain):
        slot = one.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
        slot.bias = torch.nn.Parameter(torch.linspace(-1, 1, 64, dtype=torch.float64))
    adapters = sf.attach(model, SMALL)
    train_(adapters)
    torch.testing.assert_close(model(*inputs()).sample, naive(plain, adapters, inputs()), **EXACT)


@pytest.mark.parametrize("kind", EVERY)
def test_autocast_casts_the_states_and_not_the_factors(kind):
    model, adapters, _ = pair(EVERY[kind], dtype=torch.float32)
    exact = model(*inputs(torch.float32)).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(*inputs(torch.float32)).sample
    y.float().square().sum().backward()
    assert (y.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapters.parameters())


# backward at another time than forward

@pytest.mark.parametrize("noise", [None, NOISE])
@pytest.mark.parametrize("kind", EVERY)
def test_gradient_checkpointing_is_exact(kind, noise):
    model, adapters, _ = pair(EVERY[kind])
    adapters.noise = noise
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        states = inputs()[2].requires_grad_()
        before = calls()
        y = model(*inputs()[:2], states).sample
        y.square().sum().backward()
        assert calls() == before + 1
        found.append([y.detach(), states.grad, *gradients(adapters)])
        forget(adapters)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_two_forwards_before_one_backward_keep_their_own_noise():
    model, adapters, _ = pair()
    model.train().enable_gradient_checkpointing()
    sample, t, states = inputs()
    alone = []
    for step in (1, 2):
        adapters.noise = sf.GateNoise(9, step)
        model(sample, t, states).sample.square().sum().backward()
        alone.append(gradients(adapters))
        forget(adapters)
    loss = 0
    for step in (1, 2):
        adapters.noise = sf.GateNoise(9, step)
        loss = loss + model(sample, t, states).sample.square().sum()
    adapters.noise = sf.GateNoise(9, 3)
    loss.backward()
    for one, two, both in zip(*alone, gradients(adapters), strict=True):
        torch.testing.assert_close(one + two, both, **EXACT)
    assert not torch.allclose(alone[0][0], alone[1][0])


def test_a_block_computed_again_after_disabled_stays_disabled():
    model, adapters, plain = pair()
    found = []
    for one in (model, plain):
        one.train().enable_gradient_checkpointing()
        states = inputs()[2].requires_grad_()
        with adapters.disabled():
            y = one(*inputs()[:2], states).sample
        y.square().sum().backward()
        found.append(states.grad)
    torch.testing.assert_close(*found, **EXACT)


def test_checkpointing_that_copies_the_states_is_refused():
    model, adapters, _ = pair()
    adapters.noise = NOISE
    model.train().enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, use_reentrant=True))
    sample, t, states = inputs()
    y = model(sample.requires_grad_(), t, states.requires_grad_()).sample
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()


# torch.compile

SHORT = {"dtype": torch.float32, "block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",),
         "up_block_types": ("UpBlock2D",)}


@pytest.mark.parametrize("kind", ["learned-low-rank", "hard-concrete", "2:4"])
def test_compiled_without_a_break_and_a_fold_in_between_takes_effect(kind):
    torch._dynamo.reset()
    model, adapters, plain = pair(EVERY[kind], **SHORT)
    call = inputs(torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*call).sample, model(*call).sample)
        adapters.fold_("one")
        folded = model(*call).sample
        torch.testing.assert_close(compiled(*call).sample, folded)
        train_(adapters, seed=2)
        trained = compiled(*call).sample
        torch.testing.assert_close(trained, naive(plain, adapters, call), rtol=1e-4, atol=1e-5)
    assert (trained - folded).abs().max() > 1e-3


def test_noise_in_tensors_compiles_nothing_anew():
    model, adapters, _ = pair(**SHORT)
    call = inputs(torch.float32)
    seed, step = torch.tensor(4), torch.tensor(0)
    adapters.noise = sf.GateNoise(seed, step)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    outputs, graphs = [], []
    with torch.no_grad():
        for _ in range(3):
            step += 1
            outputs.append(compiled(*call).sample)
            graphs.append(counter.frame_count)
            torch.testing.assert_close(outputs[-1], model(*call).sample)
    assert len(set(graphs)) == 1
    assert not torch.allclose(outputs[0], outputs[1])


def test_weights_loaded_into_a_compiled_model_take_effect():
    model, adapters, plain = pair(**SHORT)
    call = inputs(torch.float32)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(*call).sample
        slots = {f"{name}.weight" for name in adapters.stacks[0].names}
        other = {name: tensor * 1.5 if name in slots else tensor for name, tensor in model.state_dict().items()}
        model.load_state_dict(other, assign=True)
        after = compiled(*call).sample
        torch.testing.assert_close(after, naive(plain, adapters, call), rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


# full sizes, without their memory

SD = {"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "block_out_channels": (320, 640, 1280, 1280),
      "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3}
FULL = {
    "1.5": ({**SD, "cross_attention_dim": 768}, 32, (24_960, 768)),
    "2.1": ({**SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
            32, (24_960, 1024)),
    "xl": ({"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, "use_linear_projection": True,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816}, 140, (166_400, 2048)),
}


@pytest.mark.parametrize("kind", FULL)
def test_full_size_models_are_one_stack(kind):
    config, count, shape = FULL[kind]
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    keys = list(model.state_dict())
    adapters = sf.attach(model, sf.StaminaConfig())
    (arguments,) = adapters.arguments()
    assert arguments["weight"].shape == shape
    assert len(arguments["names"]) == len(arguments["sizes"]) == count
    assert sum(arguments["sizes"]) == arguments["p"].shape[0] == shape[0]
    assert arguments["b"].shape == (count, 16, shape[1])
    assert all(".attn2.to_" in name for name in arguments["names"])
    assert list(model.state_dict()) == keys
    adapters.detach()


def test_widths_and_dtypes_have_stacks_of_their_own():
    model = unet(torch.float32)
    model.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.double()
    adapters = sf.attach(model, SMALL)
    assert [stack.weight.dtype for stack in adapters.stacks] == [torch.float32, torch.float64]
    assert [len(stack.names) for stack in adapters.stacks] == [7, 1]
    adapters.detach()
