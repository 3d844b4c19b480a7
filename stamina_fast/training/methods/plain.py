"""The methods that are options alone: STAMINA, baselines that it is compared with, and ablations of its mask."""

from __future__ import annotations

from .base import NO_MASK, Method

METHODS = {
    "stamina": Method("hard masks sampled with noise over low-rank residuals, and an MLP token (arXiv 2311.18763)"),
    "c-stamina": Method(
        "stamina with C-LoRA's penalty on changing what earlier concepts changed", proposes={"forgetting_weight": 100.0},
    ),
    "fixed-gate": Method("stamina whose mask is trained without noise: M = [L > 0] at every step", {"noise": False}),
    "random-mask": Method(
        "low-rank residuals under a random mask of the same density that is not trained", {"mask": "random-low-rank"},
    ),
    "dense-logits": Method("stamina whose mask has a free logit for every entry", {"mask": "dense-logits"}),
    "soft-mask": Method("stamina whose mask is a sigmoid, not zero or one (arXiv 1611.00712)", {"mask": "soft"}),
    "hard-concrete": Method("stamina whose mask is that of L0 regularisation (arXiv 1712.01312)", {"mask": "hard-concrete"}),
    "top-k": Method("low-rank residuals of which each projection keeps the largest entries", {"mask": "top-k"}),
    "two-four": Method("low-rank residuals that keep the two largest of each four entries of a row", {"mask": "2:4"}),
    "custom-diffusion": Method(
        "the K and V weights and the token are trained themselves (arXiv 2212.04488); its prior pictures are prior_weight",
        NO_MASK | {"residual": "full", "token_mlp": False, "forgetting_weight": 0.0},
    ),
    "lora": Method("sequential low-rank adaptation: no mask, no penalty", NO_MASK | {"forgetting_weight": 0.0}),
    "c-lora": Method(
        "low-rank residuals without a mask, penalised where the folded past is large, and a token that is learned itself "
        "(arXiv 2304.06027, Eq. 3)", NO_MASK | {"token_mlp": False},
        proposes={"forgetting_weight": 100.0},
    ),
    "token-only": Method(
        "textual inversion: the token alone is trained, the weights stay as they are",
        NO_MASK | {"forgetting_weight": 0.0, "rank": 1, "token_mlp": False}, {"learning_rate": 0.0},
    ),
    "frozen": Method(
        "nothing is trained: the base model, and each token where it starts",
        NO_MASK | {"forgetting_weight": 0.0, "rank": 1}, {"learning_rate": 0.0, "token_learning_rate": 0.0, "steps": 1},
    ),
}
