"""lora-merge: every concept is learned from the base model alone, and the residuals are summed."""

from __future__ import annotations

import contextlib

from .base import NO_MASK, Method, Strategy


class LoraMerge(Strategy):
    """While task t is learned the weights are W_0 + A_t B_t. Between tasks they are W_0 + Σ_{i <= t} A_i B_i.

    These are separate low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) of one base model, merged by adding them up.
    Only the merged model is stored.
    """

    apart = True

    @contextlib.contextmanager
    def learning(self, trainer, task):
        adapters = trainer.adapters
        adapters.rewind([])
        try:
            yield
        finally:
            adapters.rewind(list(adapters.tasks))


METHOD = Method(
    "low-rank residuals each learned from the base weights, and summed after every task", NO_MASK | {"forgetting_weight": 0.0},
    strategy=LoraMerge,
)
