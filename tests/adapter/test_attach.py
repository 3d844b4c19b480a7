"""The life of adapters: what a start, a fold, a rewind and a detach leave behind, and what is in force in between."""

import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from unets import EVERY, SMALL, WIDTH, attached, bits, calls, effective, inputs, output, same_bits, train_, unet, values

import stamina_fast as sf
from stamina_fast.adapter.masks import MASKS, LearnedMask

NOISE = sf.GateNoise(2, 5)
NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


# attach and detach

@pytest.mark.parametrize("zero", ["a", "b"])
@pytest.mark.parametrize("kind", EVERY)
def test_a_start_changes_nothing(kind, zero):
    model, plain = unet(), unet()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    adapters = sf.attach(model, dataclasses.replace(EVERY[kind], zero_factor=zero))
    adapters.noise = NOISE
    torch.testing.assert_close(output(model), output(plain), rtol=1e-12, atol=1e-13)
    assert list(model.state_dict()) == keys
    assert same_bits(bits(model), bits(plain))
    # the U-Net's parameters are the same objects, and none of the adapters' is among them
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert not {id(p) for p in adapters.parameters()} & {id(p) for p in parameters}
    assert all(p.requires_grad and p.is_leaf for p in adapters.parameters())
    assert adapters.noise == NOISE
    trained = {name.split(".", 2)[2] for name, _ in adapters.named_parameters()}
    assert {"a", "b"} & trained == ({"a"} if kind == "full" else {"a", "b"})
    assert ("mask.q" in trained) == ("mask.gate_bias" in trained) == issubclass(MASKS[EVERY[kind].mask], LearnedMask)
    assert ("mask.p" in trained) == (kind == "dense-logits")


def test_the_weights_are_views_of_one_matrix():
    model, adapters = attached()
    (arguments,) = adapters.arguments()
    row = 0
    for name, size in zip(arguments["names"], arguments["sizes"], strict=True):
        weight = model.get_submodule(name).weight
        assert weight.data_ptr() == arguments["weight"][row].data_ptr()
        assert weight.shape == (size, WIDTH)
        row += size
    # K then V, in the order of the model
    kinds = [name.rpartition(".")[2] for name in arguments["names"]]
    assert kinds == ["to_k", "to_v"] * (len(kinds) // 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_detach_without_a_fold_restores_everything(dtype):
    model = unet(dtype)
    fired = []
    slot = model.get_submodule(NAME)
    slot.register_forward_hook(lambda *_: fired.append(1))
    before = bits(model)
    members = {name: set(vars(module)) for name, module in model.named_modules()}
    kinds = {name: (id(module), type(module)) for name, module in model.named_modules()}
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = len(model._forward_pre_hooks)
    adapters = sf.attach(model, SMALL)
    train_(adapters)
    assert type(slot) is not torch.nn.Linear
    adapters.detach()
    assert same_bits(bits(model), before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == members
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == kinds
    assert {name: p.requires_grad for name, p in model.named_parameters()} == frozen
    assert len(model._forward_pre_hooks) == hooks
    assert model.save_pretrained.__func__ is UNet2DConditionModel.save_pretrained
    # nothing is shared any more
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)
    slot(torch.zeros(1, WIDTH, dtype=dtype))
    assert fired
    adapters.detach()


def test_detach_keeps_folds_and_drops_the_rest():
    model, adapters = attached()
    train_(adapters)
    adapters.fold_("one")
    folded, y = bits(model), output(model)
    train_(adapters, seed=2)
    adapters.detach()
    before = calls()
    assert same_bits(bits(model), folded)
    torch.testing.assert_close(output(model), y, rtol=1e-12, atol=1e-12)
    assert calls() == before
    for use in (adapters.fold_, adapters.arguments, adapters.penalties, lambda: adapters.rewind([])):
        with pytest.raises(RuntimeError, match="detached; call attach again"):
            use()
    again = sf.attach(model, SMALL)
    assert again.tasks == {}


def test_a_second_attach_raises():
    model, adapters = attached()
    with pytest.raises(ValueError, match=r"already has adapters.*detach\(\)"):
        sf.attach(model, SMALL)
    adapters.detach()
    sf.attach(model, SMALL).detach()


@pytest.mark.parametrize(("build", "config", "message"), [
    (lambda: UNet2DModel(sample_size=8, block_out_channels=(32, 64), norm_num_groups=8,
                         down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2), {}, "cross-attention"),
    (lambda: unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None), {},
     "has no cross-attention"),
    (lambda: torch.nn.Linear(3, 3), {}, "got Linear"),
    (lambda: "a model", {}, "got str"),
    (unet, {"rank": 33}, "rank must be at most the smallest projection width, 32, got 33"),
    (unet, {"gate_rank": 33}, "gate_rank must be at most"),
])
def test_what_cannot_be_attached_to_says_why(build, config, message):
    model = build()
    with pytest.raises(ValueError, match=message) as error:
        sf.attach(model, dataclasses.replace(SMALL, **config))
    assert "\n" not in str(error.value)
    if isinstance(model, UNet2DConditionModel):
        assert all(type(module).__module__.split(".")[0] != "stamina_fast" for module in model.modules())


@pytest.mark.parametrize("mask", [name for name in MASKS if not MASKS[name].ranked])
def test_a_rank_that_does_not_count_may_be_anything(mask):
    attached(dataclasses.replace(SMALL, mask=mask, gate_rank=64))[1].detach()
    attached(dataclasses.replace(SMALL, mask=mask, gate_rank=64, residual="full", rank=64))[1].detach()


# what is in force

def test_arguments_are_those_of_the_call():
    model, adapters = attached()
    train_(adapters)
    adapters.noise, adapters.tau = NOISE, 0.5
    (arguments,) = adapters.arguments()
    names, states = arguments.pop("names"), inputs()[2]
    parts = sf.masked_linear(states, **arguments).split(arguments["sizes"], dim=-1)
    for name, part in zip(names, parts, strict=True):
        torch.testing.assert_close(model.get_submodule(name)(states), part)
    assert arguments["noise"] == NOISE
    assert arguments["tau"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EVERY)
def test_the_delta_of_a_projection_is_what_a_fold_adds(kind, dtype):
    model, adapters = attached(EVERY[kind], dtype)
    train_(adapters)
    adapters.noise = NOISE
    wide = torch.promote_types(dtype, torch.float32)
    deltas = {name: adapters.get_delta_weight(name) for name in adapters.stacks[0].names}
    before = {name: model.get_submodule(name).weight.to(wide, copy=True) for name in deltas}
    adapters.fold_("one")
    for name, delta in deltas.items():
        assert delta.dtype == wide
        torch.testing.assert_close(model.get_submodule(name).weight, (before[name] + delta).to(dtype))
    with pytest.raises(ValueError, match=r"no projection 'attn2'.*such as 'down_blocks"):
        adapters.get_delta_weight("attn2")


@pytest.mark.parametrize("kind", EVERY)
def test_a_cast_model_has_the_residual_of_one_attached_in_that_dtype(kind):
    model, adapters = attached(EVERY[kind], torch.float32)
    train_(adapters)
    before = adapters.get_delta_weight(NAME)
    _, other = attached(EVERY[kind], torch.bfloat16)
    other.load_state_dict(adapters.state_dict())
    model.to(torch.bfloat16)
    after = adapters.get_delta_weight(NAME)
    assert not torch.equal(after, before)
    assert torch.equal(after, other.get_delta_weight(NAME))
    assert adapters.density() == other.density()


def test_penalties_and_density():
    _, adapters = attached(dataclasses.replace(SMALL, density=0.7, gate_scale=0.0))
    sparsity, forgetting = adapters.penalties()
    assert sparsity.item() == pytest.approx(0.7)
    assert forgetting.item() == 0
    assert adapters.density() == 1
    train_(adapters)
    adapters.fold_("one")
    stack = adapters.stacks[0]
    past = stack.weight - stack.base
    sparsity, forgetting = adapters.penalties()
    assert forgetting.item() == 0
    forgetting.backward()
    assert not stack.a.grad.any()
    assert not stack.b.grad.any()
    train_(adapters, seed=2)
    adapters.noise = NOISE
    for task in ("two", "three"):
        _, forgetting = adapters.penalties()
        weights = effective(adapters.arguments()[0], NOISE)
        delta = torch.cat([weights[name] for name in stack.names]) - stack.weight
        torch.testing.assert_close(forgetting, (past * delta).square().sum())
        adapters.fold_(task)
        past = stack.weight - stack.base
        train_(adapters, seed=3)
    mask = torch.cat([adapters.get_delta_weight(name) for name in stack.names]) != 0
    torch.testing.assert_close(adapters.density(), mask.double().mean())


@pytest.mark.parametrize("kind", EVERY)
def test_states_of_the_adapters_survive_a_round_trip(kind):
    model, adapters = attached(EVERY[kind])
    train_(adapters)
    state, y = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}, output(model)
    objects = [id(p) for p in adapters.parameters()]
    adapters.reset_(3)
    adapters.load_state_dict(state)
    assert torch.equal(output(model), y)
    assert [id(p) for p in adapters.parameters()] == objects
    kept = values(adapters)
    missing = {name: tensor for name, tensor in state.items() if name != "stacks.0.a"}
    misshapen = state | {"stacks.0.a": state["stacks.0.a"].T}
    for bad in (missing, misshapen, state | {"tokens.x": torch.zeros(1)}, state | {"stacks.7.a": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"stacks\.|unknown entry"):
            adapters.load_state_dict(bad)
    assert all(torch.equal(a, b) for a, b in zip(values(adapters), kept, strict=True))
