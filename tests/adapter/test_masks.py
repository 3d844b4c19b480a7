"""The options, and the factors of the gate they make."""

import dataclasses
import math
import re

import pytest
import torch
from unets import SMALL

from stamina_fast import GateNoise, StaminaConfig, gate_mask
from stamina_fast.adapter import masks

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
    ({"mask": "soft"}, "mask must be one of learned-low-rank, random-low-rank, none, got 'soft'"),
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
    mask = masks.RandomMask(SIZES, K, dataclasses.replace(SMALL, density=share), CPU, torch.float32, dtype)
    mask.reset_(torch.Generator().manual_seed(4))
    assert not list(mask.parameters())
    opened = gate_mask(*mask.factors(), sizes=SIZES, dtype=dtype)
    for part, size in zip(opened.split(SIZES), SIZES, strict=True):
        # entries that are equal after rounding open together
        assert part.sum().item() == pytest.approx(round(share * size * K), abs=1)
    torch.testing.assert_close(masks.density(*mask.factors(), SIZES, dtype), opened.double().mean())
