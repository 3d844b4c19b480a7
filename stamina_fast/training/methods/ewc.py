"""ewc: changing a weight is penalised as much as earlier concepts depend on it, by the Fisher information."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import NO_MASK, Method, Strategy


@dataclass(eq=False)
class Ewc(Strategy):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796) of the K/V weights, in its online form.

    loss + λ · 1/2 Σ F ⊙ (W_t - W_{t-1})², with λ = forgetting_weight and W_t - W_{t-1} = A B.

    F [N, k] is the sum over earlier tasks i of the mean of (∂ℓ/∂W)², over pictures of task i with their noise, timestep and
    prompt. ℓ is the denoising loss of one picture, and the gradient is taken at W_i, right after the fold. It is squared
    for each picture by itself; the square of a batch's mean gradient would be smaller, the more so the larger the batch.

    Kirkpatrick et al. pull the weights to each W_i with its own F_i. The online form (Schwarz et al. 2018, arXiv 1805.06370,
    with γ = 1) pulls them to the latest alone, with the sum. The value of λ is not portable between models.

    fisher_batches  batches of a task that its part of F is estimated from, each in `accumulate` parts and without
                    gradient checkpointing
    """

    fisher_batches: int = 16

    def __post_init__(self) -> None:
        self._number("fisher_batches", 1, whole=True)

    def start(self, trainer) -> None:
        self.fisher = [torch.zeros_like(stack.weight, dtype=stack.a.dtype) for stack in trainer.adapters.stacks]

    def restore(self, trainer, run) -> None:
        tasks = run.tasks()
        if tasks:
            kept = run.load_task(tasks[-1]["name"]).kept
            for i, fisher in enumerate(self.fisher):
                fisher.copy_(kept[f"fisher.{i}"])

    def penalty(self, adapters) -> Tensor:
        """1/2 Σ F ⊙ (A B)² over all stacks: 0-dim, in the dtype of the factors."""
        total = 0
        for fisher, stack in zip(self.fisher, adapters.stacks, strict=True):
            factors = zip(stack.a.split(stack.sizes), stack.b, strict=True)
            total = total + (fisher * torch.cat([a @ b for a, b in factors]).square()).sum()
        return total / 2

    def end(self, trainer, task: int) -> dict[str, Tensor]:
        """Add the task's part to F. Returns F, the sum so far, as "fisher.I" [N, k] for stack I."""
        for fisher, added in zip(self.fisher, self.estimate(trainer), strict=True):
            trainer.ranks.average_([added])
            fisher += added
        return {f"fisher.{i}": fisher for i, fisher in enumerate(self.fisher)}

    def estimate(self, trainer) -> list[Tensor]:
        """The mean of (∂ℓ/∂W)² over pictures of the task's own batches that follow those of its steps, [N, k] a stack."""
        data, backbone, diffusion = trainer.data, trainer.backbone, trainer.diffusion
        sums, pictures = [torch.zeros_like(fisher) for fisher in self.fisher], 0
        for i in range(trainer.options.steps, trainer.options.steps + self.fisher_batches):
            size = data.size_at(i)
            step = trainer.captured[size].step
            data.feeds[size].fill_(step.buffers, i)
            for part in step.parts:
                noisy, target = diffusion.noised(part.latents, part.noise, part.t)
                with torch.no_grad():
                    states, pooled = backbone.encode(part.ids)
                with trainer.adapters.disabled(), weight_gradients(trainer.adapters.stacks) as gradients:
                    predicted = backbone.predict(noisy, part.t, states, pooled, part.frames)
                    # a mean over rows: each row's own loss is that many times as large
                    (diffusion.loss(predicted, target, part.t) * len(part.t)).backward()
                    for stack, rows, gradient in gradients():
                        sums[stack][rows] += gradient.square()
                pictures += len(part.t)
        return [total / pictures for total in sums]


@contextlib.contextmanager
def weight_gradients(stacks):
    """Yields a function that yields, after a backward pass within the block, the gradients of the projections' weights.

    It yields (index of the stack, its rows, gradient fp32 [n, k]) for each projection and each row of the batch: Gᵀ x, with x
    [tokens, k] the text states of that row, which must need no gradient, and G [tokens, n] the gradient of its output.
    """
    seen: list[tuple[int, slice, Tensor, Tensor]] = []

    def keep(stack: int, rows: slice):
        def hook(module, args, out: Tensor) -> Tensor:
            # the states need no gradient, so the output can be where the backward pass ends
            leaf = out.detach().requires_grad_()
            seen.append((stack, rows, args[0], leaf))
            return leaf

        return hook

    def gradients() -> Iterator[tuple[int, slice, Tensor]]:
        for stack, rows, states, leaf in seen:
            for x, g in zip(states, leaf.grad, strict=True):
                yield stack, rows, g.float().mT @ x.float()

    hooks = [
        slot.register_forward_hook(keep(i, stack.rows(index)))
        for i, stack in enumerate(stacks) for index, slot in enumerate(stack.slots)
    ]
    try:
        yield gradients
    finally:
        for hook in hooks:
            hook.remove()


METHOD = Method(
    "low-rank residuals penalised by the Fisher information of earlier concepts (arXiv 1612.00796, online)", NO_MASK,
    proposes={"forgetting_weight": 1e4}, strategy=Ewc,
)
