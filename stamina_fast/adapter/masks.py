"""The gate's factors: P = MLP(E), Q and c that are learned, or P, Q and c that are drawn once per task."""

from __future__ import annotations

import contextlib
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import functional
from ..seeds import derive_seed
from .config import StaminaConfig

# the activation, and the gain that keeps unit mean squares for normal inputs: 1 / sqrt(E[activation(z)²])
ACTIVATIONS = {"silu": (F.silu, 1.6765), "relu": (F.relu, 1.4142), "gelu": (F.gelu, 1.5335), "tanh": (torch.tanh, 1.5925)}


class MaskMLP(nn.Module):
    """P [N, s] = MLP(E), where E [N, e] holds a fixed code for each row of each projection.

    With mlp_sharing "stack" one MLP reads the codes of all N rows. With "projection" each of the G projections has an MLP of
    its own. The codes are then padded to the tallest projection and the products batched, `[G, max n, in] x [G, in, out]`.
    Everything is computed in `dtype`, fp32 or fp64, even under autocast: logits are never in half precision.
    """

    def __init__(self, sizes: tuple[int, ...], config: StaminaConfig, device: torch.device, dtype: torch.dtype, number: int):
        super().__init__()
        groups, height = (1, sum(sizes)) if config.mlp_sharing == "stack" else (len(sizes), max(sizes))
        self.activation, self.gain = ACTIVATIONS[config.mlp_activation]
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "codes", number))
        codes = torch.randn(groups, height, config.code_width, generator=generator)
        self.register_buffer("codes", codes.to(device, dtype))
        kept = torch.cat([torch.arange(n) + g * height for g, n in enumerate(sizes)]) if groups > 1 else None
        self.register_buffer("kept", None if kept is None else kept.to(device), persistent=False)
        widths = [config.code_width, *[config.mlp_width] * config.mlp_depth, config.gate_rank]
        shapes = list(itertools.pairwise(widths))
        self.weights = nn.ParameterList(torch.empty(groups, *shape, device=device, dtype=dtype) for shape in shapes)
        self.biases = nn.ParameterList(torch.empty(groups, 1, shape[1], device=device, dtype=dtype) for shape in shapes)

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """Fresh parameters in place; the entries of P start with mean square one."""
        for layer, weight in enumerate(self.weights):
            gain = self.gain if layer else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * (gain / math.sqrt(weight.shape[1])))
            self.biases[layer].zero_()

    def forward(self) -> Tensor:
        hidden = self.codes
        # the meta device knows no autocast
        exact = contextlib.nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False)
        with exact:
            for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                hidden = torch.baddbmm(bias, self.activation(hidden) if layer else hidden, weight)
        p = hidden.flatten(0, 1)
        return p if self.kept is None else p.index_select(0, self.kept)


class LearnedMask(nn.Module):
    """L = P Q + c with P = MLP(E) [N, s], Q [G, s, k] and c [G] trained."""

    def __init__(self, sizes, k: int, config: StaminaConfig, device: torch.device, dtype: torch.dtype, number: int):
        super().__init__()
        self.config = config
        self.mlp = MaskMLP(sizes, config, device, dtype, number)
        self.q = nn.Parameter(torch.empty(len(sizes), config.gate_rank, k, device=device, dtype=dtype))
        self.gate_bias = nn.Parameter(torch.empty(len(sizes), device=device, dtype=dtype))

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """Fresh P, Q and c in place. The sampled mask has the density of the options on average."""
        self.mlp.reset_(generator)
        self.q.copy_(torch.randn(self.q.shape, generator=generator) * (self.config.gate_scale / math.sqrt(self.q.shape[1])))
        self.gate_bias.fill_(math.log(self.config.density / (1 - self.config.density)))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """P, Q and c in force; gradients of P reach the MLP."""
        return self.mlp(), self.q, self.gate_bias


class RandomMask(nn.Module):
    """M = [P Q + c > 0], not trained: P and Q are normal, and c opens a share `density` of each projection."""

    def __init__(self, sizes, k: int, config: StaminaConfig, device: torch.device, dtype: torch.dtype, low: torch.dtype):
        super().__init__()
        self.config, self.sizes, self.low = config, sizes, low
        self.register_buffer("p", torch.empty(sum(sizes), config.gate_rank, device=device, dtype=dtype))
        self.register_buffer("q", torch.empty(len(sizes), config.gate_rank, k, device=device, dtype=dtype))
        self.register_buffer("gate_bias", torch.empty(len(sizes), device=device, dtype=dtype))

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """Draw P and Q in the precision of the weight, and put c half-way between the two logits at the quantile."""
        for factor in (self.p, self.q):
            factor.copy_(torch.randn(factor.shape, generator=generator).to(self.low))
        if self.p.is_meta:
            return
        for group, rows in enumerate(self.p.split(self.sizes)):
            logits = (rows @ self.q[group]).flatten()
            closed = round((1 - self.config.density) * logits.numel())
            ordered = F.pad(logits.sort().values, (1, 1))
            ordered[0], ordered[-1] = ordered[1] - 2, ordered[-2] + 2
            self.gate_bias[group] = -(ordered[closed] + ordered[closed + 1]) / 2

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """P, Q and c in force."""
        return self.p, self.q, self.gate_bias


def density(p: Tensor, q: Tensor, gate_bias: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The share of open entries of [P Q + c > 0], 0-dim float64. One projection at a time, so that no N x k mask is held."""
    split = zip(p.split(sizes), q, gate_bias, strict=True)
    opened = [
        functional.gate_mask(rows, q_g[None], c_g[None], dtype=dtype).sum(dtype=torch.float64) for rows, q_g, c_g in split
    ]
    return torch.stack(opened).sum() / (sum(sizes) * q.shape[2])
