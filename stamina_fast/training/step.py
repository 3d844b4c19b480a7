"""One optimizer step over fixed buffers: the host reads no tensor, and no buffer changes its address."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.noise import GateNoise
from .backbone import Backbone
from .diffusion import Diffusion
from .flat import Optimizer
from .ranks import Ranks

LOSSES = ("loss", "denoising", "sparsity", "forgetting", "gradient")
# how the results of the parts of a batch are joined: the largest magnitudes, then the loss and its terms
JOINS = (torch.maximum, *[torch.add] * 4)


@dataclass(frozen=True)
class Buffers:
    """What a step reads, at fixed addresses. b is the batch.

    latents, noise   [b, c, h, w] fp32: clean scaled latents and the noise put on them
    t                [b] int64 timesteps
    ids              one [b, length] int64 for each text encoder
    frames           [b, 6] fp32: original height and width, top and left of the crop, target height and width (pixels)
    seed             0-dim int64, of the gate's noise stream
    clock            0-dim int64, the index of the step; the step itself increments it
    tau              0-dim fp32, temperature of the gate's gradient
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    ids: list[Tensor]
    frames: Tensor
    seed: Tensor
    clock: Tensor
    tau: Tensor

    @staticmethod
    def empty(batch: int, shape: tuple[int, int, int], lengths: list[int], device: torch.device) -> Buffers:
        whole = {"dtype": torch.int64, "device": device}
        return Buffers(
            torch.zeros(batch, *shape, device=device), torch.zeros(batch, *shape, device=device), torch.zeros(batch, **whole),
            [torch.zeros(batch, n, **whole) for n in lengths], torch.zeros(batch, 6, device=device),
            torch.zeros((), **whole), torch.zeros((), **whole), torch.ones((), device=device),
        )

    def of_shape(self, shape: tuple[int, int, int]) -> Buffers:
        """The same buffers, except that latents and noise are new ones of shape [b, *shape]."""
        latents, noise = (torch.zeros(len(self.t), *shape, device=self.t.device) for _ in range(2))
        return replace(self, latents=latents, noise=noise)

    def parts(self, count: int) -> list[Buffers]:
        """The batch in `count` equal parts, as views."""
        latents, noise, t, frames, *ids = (x.chunk(count) for x in (self.latents, self.noise, self.t, self.frames, *self.ids))
        parts = zip(latents, noise, t, zip(*ids, strict=True), frames, strict=True)
        return [Buffers(*part[:3], list(part[3]), part[4], self.seed, self.clock, self.tau) for part in parts]

    def tensors(self) -> list[Tensor]:
        return [self.latents, self.noise, self.t, *self.ids, self.frames, self.seed, self.clock, self.tau]


class Step:
    """loss = denoising + sparsity_weight · sparsity + forgetting_weight · forgetting; then gradient, clipping, update.

    penalty      makes the forgetting penalty from the adapters (`methods.Strategy.penalty`); None: C-LoRA's
    accumulate   equal parts in which the batch goes through the model. Their gradients are summed. All parts have the same
                 mask, drawn with the same noise, so the penalties are counted once
    row_weights  the weight of each row of a part in the denoising loss, fp32 [batch / accumulate]; None: all 1
    ranks        gradients and losses are averaged over them before clipping, so that all ranks make the same update
    losses       [steps, 5] fp32, a row for each step (see LOSSES)
    bad_step     0-dim int64: the first step that met a NaN or an infinity, or -1
    bad          [len(watched)] bool: which of the watched values were not finite then

    `bad_step` and `bad` stay on the device; `trouble()` reads them.
    """

    def __init__(self, backbone: Backbone, adapters, diffusion: Diffusion, optimizer: Optimizer, buffers: Buffers,
                 steps: int, weights: tuple[float, float], clip: float | None, accumulate: int = 1,
                 row_weights: Tensor | None = None, ranks: Ranks | None = None,
                 penalty: Callable[[Any], Tensor] | None = None):
        self.ranks = ranks or Ranks()
        self.backbone, self.adapters, self.diffusion, self.optimizer = backbone, adapters, diffusion, optimizer
        self.buffers, self.weights, self.clip, self.penalty = buffers, weights, clip, penalty
        # whether the operator computes penalties too: sparsity, and C-LoRA's forgetting unless another takes its place
        self.fused = any(weights if penalty is None else weights[:1])
        self.parts, self.row_weights = buffers.parts(accumulate), row_weights
        device = buffers.t.device
        names = optimizer.names
        self.watched = [f"the parameter {n}" for n in names] + ["the latents", "the text states", "the U-Net's prediction"] + [
            f"the {n} loss" for n in LOSSES[1:4]] + [f"the gradient of {n}" for n in names] + ["the gradient's norm"]
        self.losses = torch.zeros(steps, len(LOSSES), device=device)
        self.bad = torch.zeros(len(self.watched), dtype=torch.bool, device=device)
        self.bad_step = torch.full((), -1, device=device)
        self.zeros = torch.zeros(2, device=device).unbind()

    def of_shape(self, shape: tuple[int, int, int]) -> Step:
        """The same step for latents of another shape [c, h, w]. Everything but latents and noise is shared."""
        other = copy.copy(self)
        other.buffers = self.buffers.of_shape(shape)
        other.parts = other.buffers.parts(len(self.parts))
        return other

    def begin_(self, seed: int) -> None:
        """Go back to step 0 for a task whose gate noise has this seed, with a fresh optimizer."""
        self.buffers.seed.fill_(seed)
        self.buffers.clock.zero_()
        self.losses.zero_()
        self.bad.zero_()
        self.bad_step.fill_(-1)
        self.optimizer.reset_()
        self.adapters.noise = GateNoise(self.buffers.seed, self.buffers.clock)
        self.adapters.tau = self.buffers.tau

    def addresses(self) -> list[int]:
        """The address of every tensor that a step reads or writes and that outlives the step; 0 where there is none."""
        modules = [self.backbone.unet, *self.backbone.encoders, self.adapters.stacks, self.adapters.tokens]
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        for flat in self.optimizer.flats:
            tensors += [flat.values, flat.grads, *flat.views, *flat.grad_views, *(p.grad for p in flat.parameters)]
        tensors += [*self.optimizer.tensors(), *self.buffers.tensors(), self.losses, self.bad, self.bad_step]
        if self.fused:
            tensors += [stack.past() for stack in self.adapters.stacks]
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

    def __call__(self) -> None:
        self.gradient_()
        self.optimizer.step_()

    def gradient_(self) -> None:
        """Compute the losses and the clipped gradient: everything but the optimizer's update."""
        to, optimizer = self.buffers, self.optimizer
        optimizer.zero_grads_()
        magnitudes = [optimizer.value_norms()]
        passes = [self._pass(part, first=i == 0) for i, part in enumerate(self.parts)]
        with torch.no_grad():
            parts = zip(*passes, strict=True)
            largest, *terms = (functools.reduce(join, part) for join, part in zip(JOINS, parts, strict=True))
            terms = torch.stack(terms).float()
            # a mean of magnitudes over ranks is finite exactly where all of them are
            self.ranks.average_([*(flat.grads for flat in optimizer.flats), terms, largest])
            norms = optimizer.norms()
            norm = torch.linalg.vector_norm(norms)
            self._watch(torch.cat([*magnitudes, largest, terms[1:], norms, norm[None]]))
            self.losses.index_copy_(0, to.clock[None], torch.cat([terms, norm[None]])[None])
            if self.clip is not None:
                optimizer.scale_grads_((self.clip / (norm + 1e-12)).clamp(max=1))
            to.clock.add_(1)

    def _pass(self, part: Buffers, first: bool) -> tuple[Tensor, ...]:
        """Run forward and backward of one part.

        Returns the largest magnitudes of latents, text states and prediction [3], then the loss and its three terms.
        """
        noisy, target = self.diffusion.noised(part.latents, part.noise, part.t)
        states, pooled = self.backbone.encode(part.ids)
        fused = first and self.fused
        with self.adapters.penalised() if fused else contextlib.nullcontext(lambda: self.zeros) as penalties:
            predicted = self.backbone.predict(noisy, part.t, states, pooled, part.frames)
        terms = [self.diffusion.loss(predicted, target, part.t, self.row_weights), *penalties()]
        if first and self.penalty is not None:
            terms[2] = self.penalty(self.adapters)
        loss = terms[0]
        for weight, penalty in zip(self.weights, terms[1:], strict=True):
            # a penalty without a weight needs no backward pass
            loss = loss + weight * penalty if weight else loss
        loss.backward()
        with torch.no_grad():
            largest = torch.stack([x.detach().float().abs().amax() for x in (part.latents, states, predicted)])
        return largest, *(term.detach() for term in (loss, *terms))

    def _watch(self, magnitudes: Tensor) -> None:
        """Record on the device which watched values were the first of the task that were not finite."""
        bad, clean = ~torch.isfinite(magnitudes), self.bad_step < 0
        self.bad_step.copy_(torch.where(clean & bad.any(), self.buffers.clock, self.bad_step))
        self.bad.copy_(torch.where(clean, bad, self.bad))

    def trouble(self) -> str | None:
        """Say what was not finite first, and at which step; None where all is finite. Waits for the device."""
        step = self.bad_step.item()
        if step < 0:
            return None
        # `watched` is in the order of computation: the first is the cause, the others follow from it
        where = [name for name, bad in zip(self.watched, self.bad.tolist(), strict=True) if bad]
        return f"{where[0]} is not finite at step {step}"
