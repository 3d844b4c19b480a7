"""Everything that diffusers, accelerate and PEFT may do to a U-Net with adapters works, or raises with the remedy.

What must never happen is that a residual is dropped without a word.
"""

import copy
import functools

import accelerate
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig
from unets import SMALL, attached, bits, calls, inputs, naive, output, same_bits, train_, unet

import stamina_fast as sf

NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("move", [lambda m: m.float(), lambda m: m.to(torch.bfloat16), lambda m: m.half().double()])
def test_a_cast_model_keeps_its_residual_and_its_master(move, folded):
    model, adapters = attached()
    if folded:
        train_(adapters)
        adapters.fold_("one")
    train_(adapters, seed=2)
    master = (adapters.stacks[0].master if folded else adapters.stacks[0].base).clone()
    model = move(model)
    dtype = model.dtype
    if dtype == torch.float64 and folded:
        # the halves have lost bits that the master still has: it could not be told from a foreign write
        with pytest.raises(RuntimeError, match="rewind"):
            output(model)
        adapters.rewind(["one"])
    output(model, dtype)
    (arguments,) = adapters.arguments()
    assert model.get_submodule(NAME).weight.dtype == arguments["weight"].dtype == dtype
    if folded or dtype != torch.float64:
        assert torch.equal(arguments["weight"], master.to(dtype))
    names, states = arguments.pop("names"), inputs(dtype)[2]
    y = sf.masked_linear(states, **arguments).split(arguments["sizes"], dim=-1)[names.index(NAME)]
    torch.testing.assert_close(model.get_submodule(NAME)(states), y)
    assert (y - torch.nn.functional.linear(states, model.get_submodule(NAME).weight)).abs().max() > 1e-3
    adapters.fold_("two")
    assert model.get_submodule(NAME).weight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_cast_rounds_anew_from_the_master(dtype):
    model, adapters = attached(dtype=torch.bfloat16)
    train_(adapters)
    adapters.fold_("one")
    (stack,), lost = adapters.stacks, model.get_submodule(NAME).weight.to(dtype, copy=True)
    model.to(dtype)
    adapters.arguments()
    assert torch.equal(stack.weight, stack.master.to(dtype))
    assert not torch.equal(model.get_submodule(NAME).weight, lost)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_become_the_base_while_nothing_is_folded(assign):
    model, adapters = attached()
    train_(adapters)
    other = unet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    torch.testing.assert_close(output(model), naive(other, adapters, inputs()).detach(), rtol=1e-10, atol=1e-12)
    adapters.fold_("one")
    adapters.rewind([])
    assert same_bits(bits(model), bits(other))
    adapters.detach()
    assert same_bits(bits(model), bits(other))


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_after_a_fold_are_refused_unless_they_are_the_same(assign):
    model, adapters = attached(dtype=torch.bfloat16)
    train_(adapters)
    adapters.fold_("one")
    folded = bits(model)
    model.load_state_dict(bits(model), assign=assign)
    output(model, torch.bfloat16)
    model.load_state_dict({name: tensor * 2 for name, tensor in folded.items()}, assign=assign)
    for use in (lambda: output(model, torch.bfloat16), lambda: adapters.fold_("two"), adapters.penalties):
        with pytest.raises(RuntimeError, match=r"written from outside after folding 'one'.*rewind"):
            use()
    adapters.rewind(["one"])
    name = f"{NAME}.weight"
    assert torch.equal(model.state_dict()[name], folded[name])
    output(model, torch.bfloat16)


def test_a_write_that_leaves_no_trace_is_found_before_a_fold():
    model, adapters = attached()
    train_(adapters)
    adapters.fold_("one")
    train_(adapters, seed=2)
    model.get_submodule(NAME).weight.data.add_(1)
    with pytest.raises(RuntimeError, match="written from outside"):
        adapters.fold_("two")
    kept = bits(model)
    adapters.detach()
    assert same_bits(bits(model), kept)


def test_asking_the_frozen_weights_for_gradients_raises():
    model, adapters = attached()
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"requires_grad_\(False\)"):
        model(*inputs())
    model.requires_grad_(False)
    model(*inputs()).sample.sum().backward()
    assert adapters.stacks[0].a.grad.any()


def test_a_copy_while_attached_raises():
    model, adapters = attached()
    for duplicate, part in ((copy.deepcopy, model), (copy.deepcopy, model.mid_block), (copy.copy, model.get_submodule(NAME))):
        with pytest.raises(RuntimeError, match=r"detach\(\) first"):
            duplicate(part)
    adapters.detach()
    assert same_bits(bits(copy.deepcopy(model)), bits(model))


def test_saving_refuses_an_unfolded_residual(tmp_path):
    model, adapters = attached(dtype=torch.float32)
    model.save_pretrained(tmp_path / "fresh")
    train_(adapters)
    with pytest.raises(RuntimeError, match=r"fold_\(\) to keep them"):
        model.save_pretrained(tmp_path / "unfolded")
    assert not (tmp_path / "unfolded").exists()
    y = output(model, torch.float32)
    adapters.fold_("one")
    model.save_pretrained(tmp_path / "folded", safe_serialization=True)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "folded").eval()
    assert same_bits(bits(loaded), bits(model))
    torch.testing.assert_close(output(loaded, torch.float32), y, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in unet().parameters())


def test_fused_projections_raise_before_and_after():
    model, adapters = attached()
    train_(adapters)
    y = output(model)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"unfuse_qkv_projections\(\)"):
        output(model)
    model.unfuse_qkv_projections()
    assert torch.equal(output(model), y)
    adapters.detach()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="FusedAttnProcessor2_0 bypasses"):
        sf.attach(model, SMALL)


LORA = functools.partial(LoraConfig, r=2, target_modules=["to_k", "to_v"], init_lora_weights=True)


def test_lora_layers_in_the_slots_are_refused():
    model = unet()
    model.add_adapter(LORA())
    with pytest.raises(ValueError, match=r"plain torch\.nn\.Linear, got peft.*unload"):
        sf.attach(model, SMALL)


def test_lora_layers_around_the_slots_work():
    model, adapters = attached()
    train_(adapters)
    y = output(model)
    before = calls()
    model.add_adapter(LORA())
    torch.testing.assert_close(output(model), y)
    assert calls() == before + 1
    adapters.fold_("one")
    torch.testing.assert_close(output(model), y, rtol=1e-10, atol=1e-12)
    adapters.detach()
    torch.testing.assert_close(output(model), y, rtol=1e-10, atol=1e-12)
    assert type(model.get_submodule(NAME).base_layer) is torch.nn.Linear


def test_offloading_is_refused_before_and_after():
    model, adapters = attached()
    train_(adapters)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded"):
        output(model)
    adapters.detach()
    model = unet()
    accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded"):
        sf.attach(model, SMALL)


def test_group_offloading_and_layerwise_casting_are_refused():
    model = unet(torch.float32)
    apply_layerwise_casting(model, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="cast during the forward"):
        sf.attach(model, SMALL)
    model = unet(torch.float32)
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="offloaded"):
        sf.attach(model, SMALL)


def test_weights_offloaded_below_the_u_net_are_noticed():
    model, _ = attached()
    accelerate.cpu_offload(model.mid_block, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="detach before"):
        output(model)


def test_inference_mode_changes_nothing():
    model, adapters = attached()
    train_(adapters)
    with torch.inference_mode():
        y = model(*inputs()).sample
    assert torch.equal(y, output(model))
    model = unet()
    with torch.inference_mode():
        adapters = sf.attach(model, SMALL)
        loaded = unet()
    model(*inputs()).sample.sum().backward()
    assert adapters.stacks[0].a.grad.any()
    with pytest.raises(ValueError, match="inference_mode; load it outside"):
        sf.attach(loaded, SMALL)
