"""Tiny U-Nets, and what one with adapters should compute, spelt out projection by projection with plain modules."""

from __future__ import annotations

import dataclasses

import torch
from diffusers import UNet2DConditionModel

import stamina_fast as sf
from stamina_fast.adapter.config import CHOICES

WIDTH = 32
SMALL = sf.StaminaConfig(rank=4, gate_rank=3, code_width=8, mlp_width=16)
# a config for every mask by its name, and "full" for the full residual
EVERY = {mask: dataclasses.replace(SMALL, mask=mask) for mask in CHOICES["mask"]}
EVERY["full"] = dataclasses.replace(SMALL, residual="full", mask="none")


def unet(dtype=torch.float64, **config) -> UNet2DConditionModel:
    """Five attention blocks, ten projections of 32 and 64 rows; float64 unless told, so that equal means equal."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**{
        "sample_size": 4, "in_channels": 2, "out_channels": 2, "layers_per_block": 1, "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH, "attention_head_dim": 8, "norm_num_groups": 8, **config,
    }).to(dtype).eval()


def inputs(dtype=torch.float64, seed=0, width=WIDTH):
    """(sample, timestep, text states)."""
    draw = torch.Generator().manual_seed(seed)
    sample, states = torch.randn(2, 2, 4, 4, generator=draw), torch.randn(2, 5, width, generator=draw)
    return sample.to(dtype), torch.tensor(7), states.to(dtype)


def attached(config=SMALL, dtype=torch.float64, **options):
    """(a U-Net with fresh adapters, its adapters)."""
    model = unet(dtype, **options)
    return model, sf.attach(model, config)


def output(model: UNet2DConditionModel, dtype=torch.float64) -> torch.Tensor:
    """The prediction for `inputs`, without gradients."""
    with torch.no_grad():
        return model(*inputs(dtype)).sample


def train_(adapters: sf.Adapters, seed=1, scale=0.3) -> None:
    """Stand-in for training: every factor somewhere else, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=draw).to(parameter)


def effective(arguments: dict, noise=None) -> dict[str, torch.Tensor]:
    """W + M ⊙ AB of every projection, differentiable in A and B, from `adapters.arguments()` of one stack."""
    args, weights, row = arguments, {}, 0
    mask = torch.ones_like(args["weight"], dtype=torch.bool)
    if args["p"] is not None:
        mask = sf.reference.gate_mask(
            args["p"], args["q"], args["gate_bias"], sizes=args["sizes"], noise=noise, dtype=args["weight"].dtype
        )
    for group, (name, size) in enumerate(zip(args["names"], args["sizes"], strict=True)):
        rows = slice(row, row + size)
        weights[name] = args["weight"][rows] + mask[rows] * (args["a"][rows] @ args["b"][group])
        row += size
    return weights


def naive(plain: UNet2DConditionModel, adapters: sf.Adapters, call: tuple, noise=None) -> torch.Tensor:
    """The output of `plain`, a U-Net without adapters, with the effective weights of `adapters` in its own projections."""
    weights = {}
    for arguments in adapters.arguments():
        weights |= {f"{name}.weight": weight for name, weight in effective(arguments, noise).items()}
    return torch.func.functional_call(plain, weights, call).sample


def calls(operator: str = "masked_linear") -> int:
    """Calls of an operator so far, on any backend."""
    return sum(count for name, count in sf.launches().items() if name.split("/")[0] == operator)


def bits(model) -> dict[str, torch.Tensor]:
    """A copy of every weight."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict, two: dict) -> bool:
    return list(one) == list(two) and all(one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one)


def values(adapters):
    """Copies of the parameters of the adapters."""
    return [parameter.detach().clone() for parameter in adapters.parameters()]
