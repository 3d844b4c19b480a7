"""Folding: the folded model is the model with its residual, in half precision too, and tasks can be taken back."""

import dataclasses

import pytest
import torch
from unets import EVERY, SMALL, attached, bits, calls, effective, inputs, output, same_bits, train_, unet, values

import stamina_fast as sf

NOISE = sf.GateNoise(2, 5)
NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.mark.parametrize("kind", EVERY)
def test_the_folded_model_is_the_model_with_its_residual(kind):
    model, adapters = attached(EVERY[kind])
    objects = [id(p) for p in adapters.parameters()]
    train_(adapters)
    with_residual, weights = output(model), effective(adapters.arguments()[0])
    # neither the noise nor the temperature of the last step is part of a fold
    adapters.noise, adapters.tau = NOISE, 0.3
    before = calls("fold_")
    assert adapters.fold_("one") == {}
    assert calls("fold_") == before + 1
    torch.testing.assert_close(output(model), with_residual, rtol=1e-10, atol=1e-12)
    for name, weight in weights.items():
        torch.testing.assert_close(model.get_submodule(name).weight, weight, check_device=False)
    assert [id(p) for p in adapters.parameters()] == objects
    assert not any(stack.unfolded for stack in adapters.stacks)
    # the U-Net computes the same without the operator
    adapters.detach()
    torch.testing.assert_close(output(model), with_residual, rtol=1e-10, atol=1e-12)


def test_a_task_is_folded_once():
    model, adapters = attached()
    train_(adapters)
    adapters.fold_("one")
    folded = bits(model)
    train_(adapters, seed=2)
    with pytest.raises(ValueError, match="'one' is folded or stored already"):
        adapters.fold_("one")
    assert same_bits(bits(model), folded)
    adapters.fold_()
    with pytest.raises(RuntimeError, match="folded already, as 'task-2'"):
        adapters.fold_()
    assert list(adapters.tasks) == adapters.folded == ["one", "task-2"]


def test_fresh_factors_follow_the_seed_and_the_number_of_tasks():
    _, one = attached()
    _, two = attached()
    starts = []
    for adapters, seed in ((one, 1), (two, 2)):
        starts.append(values(adapters))
        train_(adapters, seed=seed)
        adapters.fold_("t")
        starts.append(values(adapters))
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(starts[1], starts[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    one.reset_(7)
    two.reset_(7)
    assert all(torch.equal(a, b) for a, b in zip(values(one), values(two), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_folds_add_up_in_half_precision(dtype):
    """Each fold is far below the weight's last bit; only the fp32 master sees it."""
    model, adapters = attached(dataclasses.replace(SMALL, mask="none"), dtype)
    base, total = model.get_submodule(NAME).weight.float(), 0
    for task in range(200):
        with torch.no_grad():
            for stack in adapters.stacks:
                stack.a.fill_(2.0**-10)
                stack.b.fill_(2.0**-10)
        total = total + adapters.get_delta_weight(NAME)
        adapters.fold_(str(task))
    assert total.abs().min() == 200 * 4 * 2.0**-20
    torch.testing.assert_close(model.get_submodule(NAME).weight, (base + total).to(dtype), rtol=0, atol=0)


def test_entries_outside_the_mask_and_every_other_weight_keep_their_bits():
    model, adapters = attached(dataclasses.replace(SMALL, density=0.5), torch.bfloat16)
    before = bits(model)
    train_(adapters)
    masks = {name: adapters.get_delta_weight(name) for name in adapters.stacks[0].names}
    adapters.fold_("one")
    after = bits(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in masks}
    for name, delta in masks.items():
        outside = delta == 0
        assert outside.any()
        assert torch.equal(before[f"{name}.weight"][outside], after[f"{name}.weight"][outside])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_named_and_nothing_folds(bad):
    model, adapters = attached()
    train_(adapters)
    before = bits(model)
    with torch.no_grad():
        adapters.stacks[0].b[1, 2, 3] = bad
    with pytest.raises(RuntimeError, match=r"stacks\.0\.b is not finite"):
        adapters.fold_("one")
    assert same_bits(bits(model), before)
    assert adapters.tasks == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EVERY)
def test_rewind_has_the_bits_of_having_folded_just_these(kind, dtype):
    model, adapters = attached(EVERY[kind], dtype)
    base, states = bits(model), []
    for seed in (1, 2, 3):
        train_(adapters, seed=seed)
        adapters.fold_(f"t{seed}")
        states.append(bits(model))
    current = values(adapters)
    for count in (2, 0, 3, 1):
        adapters.rewind([f"t{seed}" for seed in range(1, count + 1)])
        assert same_bits(bits(model), states[count - 1] if count else base)
        assert adapters.folded == [f"t{seed}" for seed in range(1, count + 1)]
    assert all(torch.equal(a, b) for a, b in zip(values(adapters), current, strict=True))
    # a subset: as if the others had never been; stored factors alone are enough for another process
    adapters.rewind(["t3", "t1"])
    subset = bits(model)
    fresh, other = attached(EVERY[kind], dtype)
    for task in ("t1", "t3"):
        other.add_task(task, adapters.tasks[task])
    assert same_bits(bits(fresh), base)
    other.rewind(["t3", "t1"])
    assert same_bits(bits(fresh), subset)
    assert (list(other.tasks), other.folded) == (["t1", "t3"], ["t3", "t1"])
    # and a fold on top goes on from there
    for a in (adapters, other):
        a.reset_(0)
        train_(a, seed=9)
        a.fold_("last")
    assert same_bits(bits(fresh), bits(model))


def test_rewind_and_add_task_refuse_what_does_not_fit():
    model, adapters = attached()
    train_(adapters)
    adapters.fold_("one")
    folded = bits(model)
    for names in (["two"], ["one", "one"]):
        with pytest.raises(ValueError, match="at most once"):
            adapters.rewind(names)
    stored = adapters.tasks["one"]
    cases = [
        ("one", stored, "folded or stored already"),
        ("two", stored | {"stacks.1.a": stored["stacks.0.a"]}, "unknown factor"),
        ("two", {k: v for k, v in stored.items() if k != "stacks.0.q"}, r"stacks\.0\.q of task 'two' must be"),
        ("two", stored | {"stacks.0.b": stored["stacks.0.b"].mT}, r"stacks\.0\.b of task 'two' must be"),
        ("two", {}, r"stacks\.0\.a"),
    ]
    for name, tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            adapters.add_task(name, tensors)
    assert list(adapters.tasks) == ["one"]
    assert same_bits(bits(model), folded)


# what is in force

@pytest.mark.parametrize("kind", EVERY)
def test_disabled_is_the_folded_model_to_the_bit(kind):
    model, adapters = attached(EVERY[kind], torch.float32)
    train_(adapters)
    adapters.fold_("one")
    train_(adapters, seed=2)
    adapters.noise = NOISE
    plain = unet(torch.float32)
    plain.load_state_dict(model.state_dict())
    before, y = calls(), output(model, torch.float32)
    assert calls() == before + 1
    with adapters.disabled():
        with adapters.disabled():
            pass
        assert torch.equal(output(model, torch.float32), output(plain, torch.float32))
        states = inputs(torch.float32)[2]
        assert torch.equal(model.get_submodule(NAME)(states), plain.get_submodule(NAME)(states))
    assert calls() == before + 1
    assert torch.equal(output(model, torch.float32), y)
    with pytest.raises(KeyError), adapters.disabled():
        raise KeyError
    assert torch.equal(output(model, torch.float32), y)
