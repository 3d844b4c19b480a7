"""o-lora: the rows of a task's B are kept orthogonal to those of earlier tasks by a penalty."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .base import NO_MASK, Method, Strategy


class OLora(Strategy):
    """O-LoRA (Wang et al. 2023, arXiv 2310.14152): loss + λ Σ_{i < t} Σ_g ‖B_{i,g} B_{t,g}ᵀ‖²_F, with λ = forgetting_weight.

    B_{i,g} [r, k] is the factor of projection g as task i folded it. Its rows span all text states that task i reacts to:
    A B x = 0 for every x that is orthogonal to them. So with a penalty of 0 a task acts on other directions than those before.
    """

    def start(self, trainer) -> None:
        # room for all tasks, so that the address never changes; rows of zeros add nothing
        earlier = len(trainer.concepts) - 1
        self.past = []
        for stack in trainer.adapters.stacks:
            groups, rank, k = stack.b.shape
            self.past.append(stack.b.new_zeros(groups, earlier * rank, k))

    @contextlib.contextmanager
    def learning(self, trainer, task):
        for i, past in enumerate(self.past):
            for j, factors in enumerate(trainer.adapters.tasks.values()):
                b = factors[f"stacks.{i}.b"]
                past[:, j * b.shape[1] : (j + 1) * b.shape[1]] = b
        yield

    def penalty(self, adapters) -> Tensor:
        """Σ (B_i B_tᵀ)² over all entries, earlier tasks, projections and stacks: 0-dim, in the dtype of the factors."""
        products = (torch.bmm(past, stack.b.mT) for past, stack in zip(self.past, adapters.stacks, strict=True))
        return sum(product.square().sum() for product in products)


METHOD = Method(
    "low-rank residuals whose rows are penalised unless they are orthogonal to those of earlier concepts (arXiv 2310.14152)",
    NO_MASK | {"residual": "low-rank"}, proposes={"forgetting_weight": 0.5}, strategy=OLora,
)
