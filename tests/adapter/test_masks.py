"""The options, and the factors of the gate they make."""

import dataclasses
import math
import re

import pytest
import torch
from torch import nn
from unets import SMALL

from stamina_fast import GateNoise, StaminaConfig, gate_mask, gate_uniforms
from stamina_fast.adapter import masks
from stamina_fast.adapter.config import CHOICES, SAMPLED
from stamina_fast.adapter.stack import Control, Stack

CPU = torch.device("cpu")
SIZES, K = (5, 3, 8), 16


def learned(**options):
    config = dataclasses.replace(SMALL, **options)
    mask = masks.LearnedMask(SIZES, K, config, CPU, torch.float32, 0)
    mask.reset_(torch.Generator().manual_seed(1))
    return mask


@pytest.mark.parametrize(("options", "message"), [
    ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
    ({"rank": 2.5}, "got 2.5"),
    ({"gate_rank": True}, "gate_rank must be an integer"),
    ({"mask": "firm"}, f"mask must be one of {', '.join(CHOICES['mask'])}, got 'firm'"),
    ({"residual": "dense"}, "residual must be one of low-rank, full"),
    ({"zero_factor": "c"}, "zero_factor must be one of a, b"),
    ({"density": 1.0}, "mask='none'"),
    ({"density": float("nan")}, "density must be a finite number"),
    ({"tau_end": 0}, "tau_end must be positive"),
    ({"forgetting_weight": -1.0}, "forgetting_weight must not be negative"),
    ({"noise": 1}, "noise must be true or false"),
    ({"token_init": ""}, "token_init"),
])
def test_a_value_that_does_not_fit_is_one_line(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        StaminaConfig(**options)
    assert "\n" not in str(error.value)


def test_options_survive_a_dict_and_cannot_change():
    config = StaminaConfig(rank=3, mask="none", tau_schedule="cosine")
    assert StaminaConfig.from_dict(config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4
    with pytest.raises(ValueError, match="unknown option rnak"):
        StaminaConfig.from_dict({"rnak": 4})


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 2.5), ("cosine", 2.5), ("exponential", 2.0)])
def test_temperature_goes_from_start_to_end(schedule, middle):
    config = StaminaConfig(tau_start=4.0, tau_end=1.0, tau_schedule=schedule)
    assert [config.tau(at) for at in (0, 0.5, 1)] == pytest.approx([4, middle, 1])
    assert 1 < config.tau(0.75) < config.tau(0.25) < 4
    with pytest.raises(ValueError, match="progress"):
        config.tau(1.5)


def test_only_a_learned_mask_is_sampled():
    assert StaminaConfig().samples
    assert not any(StaminaConfig(**o).samples for o in ({"noise": False}, {"mask": "none"}, {"mask": "random-low-rank"}))
    assert {mask for mask in CHOICES["mask"] if StaminaConfig(mask=mask).samples} == set(SAMPLED)
    assert list(masks.MASKS) == list(CHOICES["mask"])


@pytest.mark.parametrize("sharing", ["stack", "projection"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_p_is_an_mlp_of_each_row(sharing, depth):
    mlp = learned(mlp_sharing=sharing, mlp_depth=depth, mlp_activation="tanh").mlp
    with torch.no_grad():
        for bias in mlp.biases:
            bias.normal_(generator=torch.Generator().manual_seed(2))
    p, row = mlp(), 0
    for group, size in enumerate(SIZES):
        own = 0 if sharing == "stack" else group
        for position in range(size):
            hidden = mlp.codes[0, row] if sharing == "stack" else mlp.codes[group, position]
            for layer, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
                hidden = (torch.tanh(hidden) if layer else hidden) @ weight[own] + bias[own, 0]
            torch.testing.assert_close(p[row], hidden)
            row += 1
    assert row == len(p) == sum(SIZES)


def test_gradients_reach_every_layer_and_no_code():
    mask = learned(mlp_sharing="projection", mlp_depth=2)
    p, q, gate_bias = mask.factors()
    ((p @ q[0]).square().sum() + q.sum() + gate_bias.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in mask.parameters() if parameter.numel() > 3)
    assert not mask.mlp.codes.requires_grad


def test_a_logit_is_never_half_under_autocast():
    mlp = learned().mlp
    alone = mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mlp(), alone)


def test_codes_stay_and_factors_follow_the_seed():
    mask = learned()
    codes, first = mask.mlp.codes.clone(), {name: tensor.clone() for name, tensor in mask.state_dict().items()}
    mask.reset_(torch.Generator().manual_seed(2))
    assert torch.equal(mask.mlp.codes, codes)
    assert not torch.equal(mask.q, first["q"])
    mask.reset_(torch.Generator().manual_seed(1))
    assert all(torch.equal(tensor, first[name]) for name, tensor in mask.state_dict().items())
    other = masks.LearnedMask(SIZES, K, SMALL, CPU, torch.float32, 1)
    assert not torch.equal(other.mlp.codes, codes)


@pytest.mark.parametrize("activation", masks.ACTIVATIONS)
def test_logits_start_at_the_scale_and_density_asked_for(activation):
    sizes, k = (500, 300), 64
    config = dataclasses.replace(
        SMALL, gate_rank=16, mlp_width=64, mlp_depth=2, code_width=32, gate_scale=0.5, density=0.8, mlp_activation=activation
    )
    mask = masks.LearnedMask(sizes, k, config, CPU, torch.float32, 0)
    mask.reset_(torch.Generator().manual_seed(3))
    p, q, gate_bias = mask.factors()
    logits = torch.cat([rows @ q[g] for g, rows in enumerate(p.split(sizes))])
    assert logits.std().item() == pytest.approx(0.5, rel=0.25)
    assert torch.allclose(gate_bias, torch.tensor(math.log(4)))
    sampled = gate_mask(p, q, gate_bias, sizes=sizes, noise=GateNoise(5, 0))
    assert sampled.double().mean().item() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_random_mask_opens_the_share_asked_for_in_every_projection(share, dtype):
    mask = masks.RandomMask(SIZES, K, dataclasses.replace(SMALL, density=share), CPU, dtype, 0)
    mask.reset_(torch.Generator().manual_seed(4))
    assert not list(mask.parameters())
    opened = gate_mask(*mask.factors(), sizes=SIZES, dtype=dtype)
    for part, size in zip(opened.split(SIZES), SIZES, strict=True):
        # entries that are equal after rounding open together
        assert part.sum().item() == pytest.approx(round(share * size * K), abs=1)
    torch.testing.assert_close(masks.density(*mask.factors(), SIZES, dtype), opened.double().mean())


# every mask against its equation, in a stack of three projections of odd sizes

ODD, WIDE, NOISE, TAU = (5, 3, 9), 13, GateNoise(11, 3), 0.7


def sigma(z):
    return 1 / (1 + torch.exp(-z))


def hard(stack, _, plain, z):
    s = sigma(z / TAU).detach()
    return (z > 0) + s * (1 - s) / TAU * (plain - plain.detach())


def top(stack, product, *_):
    opened = []
    for part in product.detach().abs().split(ODD):
        count = round(stack.config.density * part.numel())
        opened.append(part >= sorted(part.flatten().tolist())[-count])
    return torch.cat(opened).double()


def two_four(stack, product, *_):
    opened = torch.zeros_like(product)
    for n, row in enumerate(product.tolist()):
        for start in range(0, WIDE, 4):
            four = range(start, min(start + 4, WIDE))
            opened[n, sorted(four, key=lambda i, row=row: -abs(row[i]))[:2]] = 1
    return opened


def concrete(stack, _, plain, z):
    s = sigma(plain) if z is plain else sigma(1.5 * z)
    return (1.2 * s - 0.1).clamp(0, 1)


def soft(stack, _, plain, z):
    return sigma(plain / stack.config.tau_end) if z is plain else sigma(z / TAU)


def mean_of_sigma(plain, _):
    return sigma(plain).mean()


# (M of A B, L and z; the sparsity from L and M; whether M passes its gradient on to closed entries)
EQUATIONS = {
    "learned-low-rank": (hard, mean_of_sigma, False),
    "random-low-rank": (lambda stack, _, plain, z: (plain > 0).double(), mean_of_sigma, False),
    "none": (lambda stack, product, *_: torch.ones_like(product), lambda *_: torch.zeros(()).double(), False),
    "dense-logits": (hard, mean_of_sigma, False),
    "soft": (soft, mean_of_sigma, False),
    # the probability that s, of temperature 2/3, is above 1/12, where 1.2 s - 0.1 is zero
    "hard-concrete": (concrete, lambda plain, _: sigma(plain + math.log(11) * 2 / 3).mean(), False),
    "top-k": (top, lambda _, mask: mask.mean(), True),
    "2:4": (two_four, lambda _, mask: mask.mean(), True),
}


def logits_of(stack):
    """L = P Q + c [N, k] of the stack's mask; zeros where it has none."""
    p, q, gate_bias = stack.mask.factors()
    if p is None:
        return torch.zeros(sum(ODD), WIDE, dtype=torch.float64)
    parts = zip(p.split(ODD), q, gate_bias, strict=True)
    return torch.cat([rows @ q_g + c_g for rows, q_g, c_g in parts])


def stack_of(mask, residual="low-rank", dtype=torch.float64):
    """A stack with trained factors and something folded before."""
    draw = torch.Generator().manual_seed(6)
    slots = {f"slot{i}": nn.Linear(WIDE, n, bias=False, dtype=dtype).requires_grad_(False) for i, n in enumerate(ODD)}
    for slot in slots.values():
        slot.weight.copy_(torch.randn(slot.weight.shape, generator=draw))
    config = dataclasses.replace(SMALL, mask=mask, residual=residual, density=0.6, tau_end=1.3)
    stack = Stack(slots, config, Control(tau=TAU), 0)
    stack.reset_(draw)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter += torch.randn(parameter.shape, generator=draw)
    stack.master = stack.base + torch.randn(stack.base.shape, generator=draw)
    return stack


@pytest.mark.parametrize("noise", [None, NOISE])
@pytest.mark.parametrize("residual", CHOICES["residual"])
@pytest.mark.parametrize("mask", CHOICES["mask"])
def test_output_penalties_and_gradients_are_those_of_the_equation(mask, residual, noise):
    stack, (of, sparsity_of, passes) = stack_of(mask, residual), EQUATIONS[mask]
    stack.control.noise, stack.control.penalties = noise, {}
    draw = torch.Generator().manual_seed(7)
    x, pull = (torch.randn(4, size, generator=draw, dtype=torch.float64) for size in (WIDE, sum(ODD)))

    def gradients(y, sparsity, forgetting):
        return torch.autograd.grad((y * pull).sum() + 30 * sparsity + 0.1 * forgetting, list(stack.parameters()))

    y = torch.cat(stack.project_all(x), -1)
    penalties = stack.control.penalties[stack]
    got = gradients(y, *penalties)

    product = torch.cat([rows @ stack.b[g] for g, rows in enumerate(stack.a.split(ODD))]) if residual == "low-rank" else stack.a
    plain = logits_of(stack)
    u = gate_uniforms(NOISE, ODD, WIDE)
    z = plain if noise is None else plain + torch.log(u / (1 - u))
    m = of(stack, product, plain, z)
    delta = m * product
    if passes:
        delta = product + (delta - product).detach()
    sparsity, forgetting = sparsity_of(plain, m), ((stack.master - stack.base) * delta).square().sum()
    wanted = x @ (stack.weight + delta).T
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(penalties, (sparsity, forgetting))
    torch.testing.assert_close(stack.penalties(), (sparsity, forgetting))
    for name, one, two in zip(dict(stack.named_parameters()), got, gradients(wanted, sparsity, forgetting), strict=True):
        assert one.any(), name
        torch.testing.assert_close(one, two)

    still = of(stack, product, plain, plain).detach()
    torch.testing.assert_close(torch.cat([stack.delta(i) for i in range(len(ODD))]), still * product.detach())
    share = still.mean() if mask == "soft" else (still != 0).double().mean()
    assert stack.density().item() == pytest.approx(share.item())
    assert mask == "none" or 0.2 < share < 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", CHOICES["mask"])
def test_factors_are_rounded_to_the_weights_dtype(mask, dtype):
    """What is stored in half precision gives the same residual again, to the bit."""
    stack = stack_of(mask, dtype=dtype)
    deltas = [stack.delta(i) for i in range(len(ODD))]
    with torch.no_grad():
        for name, tensor in stack.state_dict().items():
            if name in ("a", "b", "mask.p", "mask.q"):
                tensor.copy_(tensor.to(dtype))
    assert all(torch.equal(stack.delta(i), delta) for i, delta in enumerate(deltas))
    assert stack.a.dtype == deltas[0].dtype == torch.float32


@pytest.mark.parametrize("mask", [name for name in CHOICES["mask"] if name not in SAMPLED])
def test_noise_reaches_no_mask_without_logits_of_its_own(mask):
    stack = stack_of(mask)
    alone = stack.arguments()
    stack.control.noise = NOISE
    noisy = stack.arguments()
    assert noisy["noise"] is None
    assert torch.equal(noisy["a"], alone["a"])


@pytest.mark.parametrize("mask", SAMPLED)
def test_noise_is_a_function_of_seed_and_step_and_can_be_turned_off(mask):
    stack = stack_of(mask)

    def output(noise):
        stack.control.noise = noise
        return torch.cat(stack.project_all(torch.eye(WIDE, dtype=torch.float64)), -1).detach()

    first = output(NOISE)
    assert torch.equal(output(GateNoise(torch.tensor(11), torch.tensor(3))), first)
    assert all((output(other) != first).any() for other in (GateNoise(11, 4), GateNoise(12, 3), None))
    quiet = output(None)
    stack.config = dataclasses.replace(stack.config, noise=False)
    assert torch.equal(output(NOISE), quiet)


@pytest.mark.parametrize("mask", SAMPLED)
def test_a_sampled_mask_starts_at_the_density_asked_for(mask):
    """For "soft" the share above one half."""
    stack = stack_of(mask)
    stack.master = None
    stack.reset_(torch.Generator().manual_seed(8))
    expected = stack.penalties()[0].item()
    assert expected == pytest.approx(0.6, abs=0.05)
    with torch.no_grad():
        stack.a.fill_(0.5)
        stack.b.fill_(0.5)
    opened = []
    for step in range(200):
        stack.control.noise, x = GateNoise(2, step), torch.eye(WIDE, dtype=torch.float64)
        # the residual is M, since A B = 1
        residual = torch.cat(stack.project_all(x), -1).detach().T - stack.weight
        opened.append(residual > (0.5 if mask == "soft" else 1e-9))
    assert torch.stack(opened).double().mean().item() == pytest.approx(expected, abs=0.01)


def test_at_the_start_every_entry_of_a_product_by_magnitude_can_learn():
    """A B = 0 there, and a mask that stopped gradients would choose by the place of an entry alone."""
    for mask in ("top-k", "2:4"):
        stack = stack_of(mask)
        stack.reset_(torch.Generator().manual_seed(9))
        assert not stack.delta(0).any()
        torch.cat(stack.project_all(torch.ones(1, WIDE).double()), -1).sum().backward()
        assert stack.a.grad.all()
