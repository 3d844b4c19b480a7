"""StaminaConfig: the options of the method, each with its meaning and a default."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from ..errors import InputError

CHOICES = {
    "residual": ("low-rank", "full"),
    "mask": ("learned-low-rank", "random-low-rank", "none", "dense-logits", "soft", "hard-concrete", "top-k", "2:4"),
    "zero_factor": ("a", "b"),
    "mlp_sharing": ("stack", "projection"),
    "mlp_activation": ("silu", "relu", "gelu", "tanh"),
    "tau_schedule": ("linear", "cosine", "exponential"),
}
# masks that training samples with noise
SAMPLED = ("learned-low-rank", "dense-logits", "soft", "hard-concrete")
AT_LEAST = {
    "rank": 1, "gate_rank": 1, "mlp_depth": 0, "mlp_width": 1, "code_width": 1,
    "token_vectors": 1, "token_depth": 0, "token_width": 1, "token_input_width": 1, "seed": 0,
}
POSITIVE = ("factor_scale", "tau_start", "tau_end")
NOT_NEGATIVE = ("gate_scale", "sparsity_weight", "forgetting_weight")


@dataclasses.dataclass(frozen=True)
class StaminaConfig:
    """What is learned in one task: `W + M ⊙ (A B)` with `M = [P Q + c + noise > 0]`, and the token. No learning rates.

    Residual
        rank: columns of A and rows of B, r.
        zero_factor: which of "a" and "b" starts at zero, so that A·B = 0.
        factor_scale: the other factor starts normal, with standard deviation factor_scale / sqrt(its fan-in): of k for
            B, of r for A.
        residual: "low-rank" is A B. "full" trains a dense D [N, k] from zero in its place, as Custom Diffusion does
            (arXiv 2212.04488); then rank, zero_factor and factor_scale do not count.
    Mask
        mask: "learned-low-rank" is STAMINA's, and "none" is M = 1, plain low-rank adaptation. The others are ablations:
            "random-low-rank" is drawn once per task and not trained; exactly a share `density` of its entries is open in every
                projection
            "dense-logits" is hard and sampled like STAMINA's, with a free logit for every entry
            "soft" is sigmoid(z / tau) in (0, 1), from STAMINA's logits; a fold takes sigmoid(L / tau_end)
            "hard-concrete" is the stretched and clipped sigmoid of L0 regularisation, from STAMINA's logits
            "top-k" opens the share `density` of largest |A B| in every projection
            "2:4" opens the two largest of each four neighbouring |A B| in a row
            The last five take several times the memory of the weights: use them on small models, as the full residual.
        gate_rank: columns of P and rows of Q, s, where logits are of low rank.
        density: of the mask at the start of a task, in (0, 1): c starts at ln(density / (1 - density)), and a little lower for
            "hard-concrete", which has more ways to be open. "2:4" does not read it.
        gate_scale: standard deviation of the entries of P Q at the start, in logits.
        code_width: width e of the fixed code E [n, e] from which the mask MLP makes P [n, s].
        mlp_depth, mlp_width, mlp_activation: hidden layers of the mask MLP (0: one linear map), their width and activation.
        mlp_sharing: one MLP for the rows of a whole "stack", or one for every "projection".
        noise: whether training samples a mask that has logits with logistic noise; False trains the deterministic gate.
        tau_start, tau_end: temperature of the slope at a task's first and last step. It changes the mask itself only if "soft".
        tau_schedule: how it gets from one to the other: "linear", "cosine" or "exponential".
    Penalties, added to the loss
        sparsity_weight: of the expected density of the mask.
        forgetting_weight: of Σ (S ⊙ Δ)² with S the sum of earlier folds (C-LoRA). Its scale differs between models.
    Token
        token_mlp: True: an MLP on a fixed input makes the embedding (STAMINA). False: the row itself is trained (C-LoRA).
        token_init: where the embedding starts: "random" (a random direction) or "mean" (of words in use), both as large as
            a word in use, or a word that is one token. A concept's own initializer_token comes before it.
        token_vectors: embeddings of a token, n. In tokenizers they are <cat>, <cat>_1, …, <cat>_{n-1}, as in diffusers.
        token_depth, token_width: hidden layers of the token's MLP (0: one linear map) and their width.
        token_input_width: width of its fixed input.
    seed: of the codes and of every fresh factor.

    Raises InputError, a ValueError, for a value that does not fit.
    """

    rank: int = 16
    zero_factor: str = "a"
    factor_scale: float = 1.0
    residual: str = "low-rank"
    mask: str = "learned-low-rank"
    gate_rank: int = 16
    density: float = 0.9
    gate_scale: float = 1.0
    code_width: int = 32
    mlp_depth: int = 1
    mlp_width: int = 64
    mlp_activation: str = "silu"
    mlp_sharing: str = "stack"
    noise: bool = True
    tau_start: float = 1.0
    tau_end: float = 1.0
    tau_schedule: str = "linear"
    sparsity_weight: float = 0.0
    forgetting_weight: float = 0.0
    token_mlp: bool = True
    token_init: str = "random"
    token_vectors: int = 1
    token_depth: int = 1
    token_width: int = 64
    token_input_width: int = 32
    seed: int = 0

    def __post_init__(self):
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in (*POSITIVE, *NOT_NEGATIVE, "density"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, got {value!r}")
            if value < 0 or (name in POSITIVE and value == 0):
                raise InputError(f"{name} must {'be positive' if name in POSITIVE else 'not be negative'}, got {value!r}")
        if not 0 < self.density < 1:
            raise InputError(f"density must be between 0 and 1, both excluded, got {self.density!r}; for M = 1 set mask='none'")
        for name in ("noise", "token_mlp"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.token_init, str) or not self.token_init:
            raise InputError(f"token_init must be random, mean or a word, got {self.token_init!r}")

    @property
    def samples(self) -> bool:
        """Whether training samples the mask: only masks with learned logits are sampled."""
        return self.noise and self.mask in SAMPLED

    def tau(self, progress: float) -> float:
        """The temperature at `progress` in [0, 1] through a task."""
        if not 0 <= progress <= 1:
            raise InputError(f"progress must be between 0 and 1, got {progress!r}")
        if self.tau_schedule == "exponential":
            return self.tau_start ** (1 - progress) * self.tau_end**progress
        part = progress if self.tau_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.tau_start + (self.tau_end - self.tau_start) * part

    def to_dict(self) -> dict[str, int | float | str | bool]:
        """Every option by name, ready for YAML or JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, object]) -> StaminaConfig:
        """The config of these options; an unknown name raises InputError, a missing one takes its default."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise InputError(f"unknown option {', '.join(unknown)}; the options are {', '.join(known)}")
        return cls(**options)
