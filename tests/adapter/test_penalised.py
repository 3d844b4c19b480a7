"""The penalties of a training step: out of the U-Net's own forward, once for each stack, and the same as on their own."""

import pytest
import torch
from unets import WIDTH, attached, calls, inputs, train_, unet

import stamina_fast as sf
from stamina_fast.adapter import masks

NOISE = sf.GateNoise(11, 3)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def prepared(adapters, noise=NOISE):
    """Adapters with something folded and something not, noise and a temperature."""
    train_(adapters)
    adapters.fold_("one")
    train_(adapters, seed=2)
    adapters.noise, adapters.tau = noise, 0.7
    return adapters


def step(model, adapters, call, fused):
    """(loss terms, gradients) of one step with both penalties, `fused` or each on its own."""
    if fused:
        with adapters.penalised() as penalties:
            y = model(*call).sample
        sparsity, forgetting = penalties()
    else:
        y = model(*call).sample
        sparsity, forgetting = adapters.penalties()
    for parameter in adapters.parameters():
        parameter.grad = None
    (y.square().mean() + 3 * sparsity + 0.2 * forgetting).backward()
    return [y, sparsity, forgetting], [parameter.grad for parameter in adapters.parameters()]


def same(one, two):
    for left, right in zip((*one[0], *one[1]), (*two[0], *two[1]), strict=True):
        torch.testing.assert_close(left, right, **EXACT)


@pytest.mark.parametrize("noise", [None, NOISE])
def test_a_step_is_that_of_separate_penalties(noise, monkeypatch):
    model, adapters = attached()
    prepared(adapters, noise)
    call = inputs()
    alone = step(model, adapters, call, False)
    ran, before, made = [], [calls(name) for name in ("masked_linear", "masked_linear_backward")], masks.MaskMLP.forward
    monkeypatch.setattr(masks.MaskMLP, "forward", lambda self: ran.append(self) or made(self))
    same(step(model, adapters, call, True), alone)
    assert len(ran) == 1
    assert [calls(name) for name in ("masked_linear", "masked_linear_backward")] == [n + 1 for n in before]
    assert alone[0][2] > 0


def test_several_stacks_each_leave_their_own():
    model = unet(torch.float32)
    model.mid_block.double()
    adapters = sf.attach(model, sf.StaminaConfig(rank=4, gate_rank=3, code_width=8, mlp_width=16))
    prepared(adapters)
    assert len(adapters.stacks) == 2
    with adapters.penalised() as penalties:
        for stack in adapters.stacks:
            stack.project_all(torch.zeros(1, 2, WIDTH, dtype=stack.weight.dtype))
    before = calls("gate_penalties")
    fused, alone = penalties(), adapters.penalties()
    assert calls("gate_penalties") == before + 2
    for one, two in zip(fused, alone, strict=True):
        torch.testing.assert_close(one, two)
    # the mean over all entries, and the sum
    both = [stack.penalties() for stack in adapters.stacks]
    entries = [stack.weight.numel() for stack in adapters.stacks]
    mean = sum(n * s.item() for n, (s, _) in zip(entries, both, strict=True)) / sum(entries)
    assert fused[0].item() == pytest.approx(mean)
    assert fused[1].item() == pytest.approx(sum(f.item() for _, f in both))


def test_gradient_checkpointing_changes_nothing():
    model, adapters = attached()
    prepared(adapters)
    call = inputs()
    plain = step(model, adapters, call, True)
    model.train().enable_gradient_checkpointing()
    before = calls("gate_penalties")
    same(step(model, adapters, call, True), plain)
    assert calls("gate_penalties") == before + 1


def test_stacks_that_no_forward_used_are_computed():
    model, adapters = attached()
    prepared(adapters)
    wanted = adapters.penalties()
    with adapters.penalised() as penalties:
        pass
    assert all(torch.equal(one, two) for one, two in zip(penalties(), wanted, strict=True))
    with adapters.penalised() as penalties, adapters.disabled():
        model(*inputs())
    assert all(torch.equal(one, two) for one, two in zip(penalties(), wanted, strict=True))


def test_the_first_forward_of_a_block_counts_and_the_block_ends():
    model, adapters = attached()
    prepared(adapters)
    wanted, before = adapters.penalties(), calls("gate_penalties")
    with adapters.penalised() as penalties:
        model(*inputs())
        adapters.noise = sf.GateNoise(1, 1)
        model(*inputs())
    model(*inputs())
    assert all(torch.equal(one, two) for one, two in zip(penalties(), wanted, strict=True))
    assert calls("gate_penalties") == before + 1
    with pytest.raises(RuntimeError, match="stop"), adapters.penalised():
        raise RuntimeError("stop")
    model(*inputs())
    assert calls("gate_penalties") == before + 1


def test_text_states_that_no_hook_saw():
    """A projection called by itself: with noise it takes the whole stack, which leaves its penalties as well."""
    model, adapters = attached()
    prepared(adapters)
    projection = model.get_submodule(adapters.stacks[0].names[3])
    with adapters.penalised() as penalties:
        y = projection(inputs()[2])
    torch.testing.assert_close(y, projection(inputs()[2]), **EXACT)
    for one, two in zip(penalties(), adapters.penalties(), strict=True):
        torch.testing.assert_close(one, two, **EXACT)


def test_compiled_without_a_break():
    torch._dynamo.reset()
    model, adapters = attached()
    prepared(adapters)
    call = inputs()
    plain = step(model, adapters, call, True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        same(step(compiled, adapters, call, True), plain)
    torch._dynamo.reset()
