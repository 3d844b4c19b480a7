"""The masks, one class each, and `MASKS` from the option's name to the class.

A mask M [N, k] belongs to a stack of G projections with N rows. Two kinds exist:

- The fused operators make M = [P Q + c > 0] themselves, from the factors P, Q and c. M is never stored.
- A mask of any other form computes its residual M ⊙ (A B) [N, k] in plain torch. It is for ablations on small models, since
  that takes several times the memory of the weights.
"""

from __future__ import annotations

import contextlib
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import functional, reference
from ..ops.noise import GateNoise
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


class Mask(nn.Module):
    """What a stack asks of its mask.

    sizes are the rows of the G projections, summing to N. `low` is the dtype of the weight. Parameters and buffers are in
    fp32 (fp64 where `low` is fp64). Parameters train; buffers do not. `number` tells the stacks of a model apart.

    ranked: whether the option gate_rank counts.
    """

    ranked = False

    def __init__(
        self, sizes: tuple[int, ...], k: int, config: StaminaConfig, device: torch.device, low: torch.dtype, number: int
    ):
        super().__init__()
        self.sizes, self.config, self.low = sizes, config, low

    def reset_(self, generator: torch.Generator) -> None:
        """Draw the values that a task starts from, in place."""

    def factors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """P [N, s], Q [G, s, k] and c [G] of the logits L = P Q + c, or None three times."""
        return None, None, None

    def residual(self, a: Tensor, b: Tensor, noise: GateNoise | None, tau: float | Tensor) -> Tensor | None:
        """M ⊙ (A B) [N, k] of a [N, r] and b [G, r, k], differentiable; None where the operator makes M from the factors.

        A function of (seed, step) of the noise; without noise it is what a fold adds, whatever tau.
        """
        return None

    def sparsity(self) -> Tensor | None:
        """The expected density, 0-dim and differentiable; None where the operator computes it from the factors."""
        return None

    def density(self, a: Tensor, b: Tensor) -> Tensor:
        """The share of entries of M that are not zero, without noise, for factors as in `residual`; 0-dim float64."""
        p, q, gate_bias = self.factors()
        if p is None:
            return torch.ones((), dtype=torch.float64, device=a.device)
        return density(p, q, gate_bias, self.sizes, self.low)


class NoMask(Mask):
    """M = 1: plain low-rank adaptation."""


class LearnedMask(Mask):
    """M = [L > 0] with L = P Q + c, of which P = MLP(E) [N, s], Q [G, s, k] and c [G] are trained (arXiv 2311.18763)."""

    ranked = True

    def __init__(self, sizes, k, config, device, low, number):
        super().__init__(sizes, k, config, device, low, number)
        dtype = reference.compute_dtype(low)
        self.mlp = MaskMLP(sizes, config, device, dtype, number)
        self.q = nn.Parameter(torch.empty(len(sizes), config.gate_rank, k, device=device, dtype=dtype))
        self.gate_bias = nn.Parameter(torch.empty(len(sizes), device=device, dtype=dtype))

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """Fresh P, Q and c in place. The sampled mask has the density of the options on average."""
        self.mlp.reset_(generator)
        self.q.copy_(torch.randn(self.q.shape, generator=generator) * (self.config.gate_scale / math.sqrt(self.q.shape[1])))
        self.gate_bias.fill_(logit(self.config.density))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """P, Q and c in force; gradients of P reach the MLP."""
        return self.mlp(), self.q, self.gate_bias


class RandomMask(Mask):
    """M = [P Q + c > 0], not trained: P and Q are normal, and c opens a share `density` of each projection."""

    ranked = True

    def __init__(self, sizes, k, config, device, low, number):
        super().__init__(sizes, k, config, device, low, number)
        dtype = reference.compute_dtype(low)
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


class DenseLogitsMask(Mask):
    """M = [L > 0] with a free logit for every entry: L = P I + c, of which P [N, k] is trained.

    Q is an identity for each projection and c [G] is fixed, so the fused operators make this mask too, of gate rank k.
    """

    def __init__(self, sizes, k, config, device, low, number):
        super().__init__(sizes, k, config, device, low, number)
        dtype = reference.compute_dtype(low)
        self.p = nn.Parameter(torch.empty(sum(sizes), k, device=device, dtype=dtype))
        self.register_buffer("gate_bias", torch.empty(len(sizes), device=device, dtype=dtype))

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """Fresh logits in place. They have the spread, and the sampled mask the density, that a learned mask starts with."""
        self.p.copy_(torch.randn(self.p.shape, generator=generator) * self.config.gate_scale)
        self.gate_bias.fill_(logit(self.config.density))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """P, identities, and c."""
        return self.p, identity(len(self.sizes), self.p), self.gate_bias


class SoftMask(LearnedMask):
    """M = sigmoid(z / tau) in (0, 1), with its own gradient and not a straight-through one.

    z = L + ln u - ln(1 - u), and tau is that of the step: the binary concrete distribution (Maddison et al. 2017,
    arXiv 1611.00712). Without noise M = sigmoid(L / tau_end). The logits L are those of `LearnedMask`.
    """

    def values(self, noise: GateNoise | None, tau: float | Tensor) -> Tensor:
        """M [N, k]."""
        return torch.sigmoid(self.logits(noise) / (self.config.tau_end if noise is None else tau))

    def logits(self, noise: GateNoise | None = None) -> Tensor:
        """L [N, k], or z where there is noise, of P and Q rounded to the weight's dtype."""
        p, q, gate_bias = self.factors()
        with exact(q.device):
            return reference.noisy_logits(p, q, gate_bias, self.sizes, self.low, noise)

    def residual(self, a: Tensor, b: Tensor, noise: GateNoise | None, tau: float | Tensor) -> Tensor:
        return self.values(noise, tau) * product(a, b, self.sizes, self.low)

    def sparsity(self) -> Tensor:
        """The mean of sigmoid(L), which is the expected share of entries above one half."""
        return torch.sigmoid(self.logits()).mean()

    def density(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean of M, none of whose entries is zero."""
        return self.values(None, self.config.tau_end).mean(dtype=torch.float64)


class HardConcreteMask(SoftMask):
    """M = min(1, max(0, s (ζ - γ) + γ)) with s = sigmoid(z / β), of which many entries are exactly 0 or 1.

    The hard concrete distribution of L0 regularisation (Louizos et al. 2018, arXiv 1712.01312, Eq. 10 and 11), whose ln α is
    L, with the constants of that paper: γ = -0.1, ζ = 1.1, β = 2/3. tau is not used. Without noise s = sigmoid(L) (Eq. 13).
    """

    LOW, HIGH, BETA = -0.1, 1.1, 2 / 3
    # β ln(-γ/ζ): an entry is zero where z falls below it
    ZERO = BETA * math.log(-LOW / HIGH)

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """Fresh logits in place; the sampled mask has the density of the options on average."""
        super().reset_(generator)
        self.gate_bias.add_(self.ZERO)

    def values(self, noise: GateNoise | None, tau: float | Tensor) -> Tensor:
        """M [N, k]."""
        logits = self.logits(noise)
        s = torch.sigmoid(logits if noise is None else logits / self.BETA)
        return (s * (self.HIGH - self.LOW) + self.LOW).clamp(0, 1)

    def sparsity(self) -> Tensor:
        """The mean of sigmoid(L - β ln(-γ/ζ)), the probability that an entry is not zero (Eq. 12)."""
        return torch.sigmoid(self.logits() - self.ZERO).mean()

    def density(self, a: Tensor, b: Tensor) -> Tensor:
        """The share of entries that are not zero, without noise."""
        return (self.values(None, self.config.tau_end) > 0).mean(dtype=torch.float64)


class TopKMask(Mask):
    """M = [|A B| >= v], where v opens a share `density` of each projection, at least one entry. Nothing of M is trained.

    The gradient is straight-through, d(A B) := d(M ⊙ A B), so that a closed entry can grow and open (Wortsman et al. 2019,
    arXiv 1906.00586). Entries of equal size open together: all of them while A B = 0.
    """

    def __init__(self, sizes, k, config, device, low, number):
        super().__init__(sizes, k, config, device, low, number)
        share = torch.full((), self.share(k), device=device, dtype=reference.compute_dtype(low))
        self.register_buffer("constant", share, persistent=False)

    def count(self, entries: int) -> int:
        """How many of a projection's entries are open."""
        return max(1, entries - round((1 - self.config.density) * entries))

    def share(self, k: int) -> float:
        """The share of a stack's entries that are open."""
        return sum(self.count(n * k) for n in self.sizes) / (sum(self.sizes) * k)

    def opened(self, magnitude: Tensor) -> Tensor:
        """M as bool [N, k] from |A B| [N, k]."""
        parts = magnitude.split(self.sizes)
        return torch.cat([part >= part.flatten().topk(self.count(part.numel())).values[-1] for part in parts])

    def residual(self, a: Tensor, b: Tensor, noise: GateNoise | None, tau: float | Tensor) -> Tensor:
        whole = product(a, b, self.sizes, self.low)
        fixed = whole.detach()
        # exactly 0 where M is, and exactly A B elsewhere; the gradient is that of A B
        return whole - fixed.masked_fill(self.opened(fixed.abs()), 0)

    def sparsity(self) -> Tensor:
        """The share that is open, a constant."""
        return self.constant

    def density(self, a: Tensor, b: Tensor) -> Tensor:
        return self.opened(product(a, b, self.sizes, self.low).abs()).mean(dtype=torch.float64)


class TwoFourMask(TopKMask):
    """M keeps, of each four neighbouring entries of a row, the two of largest |A B|; of equal ones the first. Not trained.

    This is the pattern of sparse tensor cores, with the straight-through gradient d(A B) := d(M ⊙ A B) (Zhou et al. 2021,
    arXiv 2102.04010, without the decay of closed weights that they add). Where k is no multiple of four, the one, two or
    three last entries of a row are a group too, and keep at most two.
    """

    def share(self, k: int) -> float:
        return (k // 4 * 2 + min(2, k % 4)) / k

    def opened(self, magnitude: Tensor) -> Tensor:
        k = magnitude.shape[1]
        # what is added counts as smaller than anything
        fours = F.pad(magnitude, (0, -k % 4), value=-1).unflatten(1, (-1, 4))
        first = fours.sort(dim=-1, descending=True, stable=True).indices[..., :2]
        return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, first, True).flatten(1)[:, :k]


def density(p: Tensor, q: Tensor, gate_bias: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The share of open entries of [P Q + c > 0], 0-dim float64. One projection at a time, so that no N x k mask is held."""
    split = zip(p.split(sizes), q, gate_bias, strict=True)
    opened = [
        functional.gate_mask(rows, q_g[None], c_g[None], dtype=dtype).sum(dtype=torch.float64) for rows, q_g, c_g in split
    ]
    return torch.stack(opened).sum() / (sum(sizes) * q.shape[2])


def exact(device: torch.device) -> contextlib.AbstractContextManager:
    """A block whose products are in fp32: outside autocast, and outside TF32, but a compiled forward cannot set that."""
    if torch.compiler.is_compiling() and device.type != "meta":
        return torch.autocast(device.type, enabled=False)
    return reference.full_precision(device)


def product(a: Tensor, b: Tensor, sizes: tuple[int, ...], low: torch.dtype) -> Tensor:
    """A B [N, k] of a [N, r] and b [G, r, k], both rounded to the weight's dtype `low`; in fp32 (fp64 for fp64)."""
    with exact(a.device):
        return reference.residual(a, b, None, None, None, sizes, low)


def identity(groups: int, like: Tensor) -> Tensor:
    """An identity for each projection, [G, k, k], with the width k, dtype and device of `like` [N, k]."""
    k = like.shape[1]
    return torch.eye(k, dtype=like.dtype, device=like.device).expand(groups, k, k)


def logit(share: float) -> float:
    """ln(share / (1 - share))."""
    return math.log(share / (1 - share))


MASKS: dict[str, type[Mask]] = {
    "learned-low-rank": LearnedMask,
    "random-low-rank": RandomMask,
    "none": NoMask,
    "dense-logits": DenseLogitsMask,
    "soft": SoftMask,
    "hard-concrete": HardConcreteMask,
    "top-k": TopKMask,
    "2:4": TwoFourMask,
}
