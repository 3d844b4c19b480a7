"""One optimizer step over fixed buffers: no tensor is read by the host, no buffer changes its address."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise import GateNoise
from ..seeds import derive_seed
from .backbone import Backbone
from .diffusion import Diffusion
from .flat import Optimizer
from .latents import LatentBank

LOSSES = ("loss", "denoising", "sparsity", "forgetting", "gradient")


@dataclass(frozen=True)
class Buffers:
    """What a step reads, at fixed addresses; b the batch.

    latents, noise   [b, c, h, w] fp32: clean scaled latents and the noise put on them
    t                [b] int64 timesteps
    ids              one [b, length] int64 for each text encoder
    frames           [b, 6] fp32: original height and width, top and left of the crop, target height and width (pixels)
    seed, clock      0-dim int64: of the gate's noise stream; the step, counted on by the step itself
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


class Feed:
    """Fills the buffers for any step of a task, as a function of (seed, task, step) alone."""

    def __init__(self, buffers: Buffers, bank: LatentBank, ids: list[Tensor], size: int, timesteps: int, seed: int):
        self.buffers, self.bank, self.ids = buffers, bank, [part.to(bank.mean.device)[bank.picture] for part in ids]
        self.timesteps, self.seed = timesteps, seed
        self.draw = torch.Generator(device=bank.mean.device)
        self.frames = torch.cat([bank.frames, torch.full_like(bank.frames[:, :2], size)], 1)

    def fill_(self, step: int) -> None:
        """Random variants with their prompts, posterior samples, noise, and one timestep in each b-th part of the schedule."""
        to, draw = self.buffers, self.draw.manual_seed(derive_seed(self.seed, "batch", step))
        b, device = len(to.t), to.t.device
        index = torch.randint(len(self.bank), (b,), generator=draw, device=device)
        to.latents.copy_(self.bank.draw(index, torch.randn(to.latents.shape, generator=draw, device=device)))
        to.noise.normal_(generator=draw)
        share = (torch.arange(b, device=device) + torch.rand(b, generator=draw, device=device)) / b
        to.t.copy_((share * self.timesteps).long().clamp(max=self.timesteps - 1))
        to.frames.copy_(self.frames[index])
        for buffer, ids in zip(to.ids, self.ids, strict=True):
            buffer.copy_(ids[index])


class Step:
    """loss = denoising + sparsity_weight · sparsity + forgetting_weight · forgetting, its gradient, clipping, AdamW.

    `losses` [steps, 5] fp32 takes a row a step (see LOSSES). `bad_step` is the first step that met a NaN or an infinity, or
    -1, and `bad` says where: both stay on the device until `trouble()` is asked.
    """

    def __init__(self, backbone: Backbone, adapters, diffusion: Diffusion, optimizer: Optimizer, buffers: Buffers,
                 steps: int, weights: tuple[float, float], clip: float | None):
        self.backbone, self.adapters, self.diffusion, self.optimizer = backbone, adapters, diffusion, optimizer
        self.buffers, self.weights, self.clip = buffers, weights, clip
        device = buffers.t.device
        names = optimizer.names
        self.watched = [f"the parameter {n}" for n in names] + ["the latents", "the text states", "the U-Net's prediction"] + [
            f"the {n} loss" for n in LOSSES[1:4]] + [f"the gradient of {n}" for n in names] + ["the gradient's norm"]
        self.losses = torch.zeros(steps, len(LOSSES), device=device)
        self.bad = torch.zeros(len(self.watched), dtype=torch.bool, device=device)
        self.bad_step = torch.full((), -1, device=device)
        zeros = torch.zeros(2, device=device).unbind()
        self.penalised = adapters.penalised if any(weights) else lambda: contextlib.nullcontext(lambda: zeros)

    def begin_(self, seed: int) -> None:
        """Back to step 0 of a task whose gate noise has this seed; parameters are views again, the optimizer is fresh."""
        self.buffers.seed.fill_(seed)
        self.buffers.clock.zero_()
        self.losses.zero_()
        self.bad.zero_()
        self.bad_step.fill_(-1)
        self.optimizer.reset_()
        self.adapters.noise = GateNoise(self.buffers.seed, self.buffers.clock)
        self.adapters.tau = self.buffers.tau

    def __call__(self) -> None:
        to, optimizer = self.buffers, self.optimizer
        optimizer.zero_grads_()
        sizes = [optimizer.value_norms()]
        noisy, target = self.diffusion.noised(to.latents, to.noise, to.t)
        states, pooled = self.backbone.encode(to.ids)
        with self.penalised() as penalties:
            predicted = self.backbone.predict(noisy, to.t, states, pooled, to.frames)
        sparsity, forgetting = penalties()
        denoising = self.diffusion.loss(predicted, target, to.t)
        loss = denoising
        for weight, penalty in zip(self.weights, (sparsity, forgetting), strict=True):
            # what has no weight asks for no gradient
            loss = loss + weight * penalty if weight else loss
        loss.backward()
        norms = optimizer.norms()
        norm = torch.linalg.vector_norm(norms)
        with torch.no_grad():
            terms = torch.stack([denoising, sparsity, forgetting]).float()
            sizes += [torch.stack([x.detach().float().abs().amax() for x in (to.latents, states, predicted)]), terms, norms]
            self._watch(torch.cat([*sizes, norm[None]]))
            self.losses.index_copy_(0, to.clock[None], torch.cat([loss[None], terms, norm[None]])[None])
            if self.clip is not None:
                optimizer.scale_grads_((self.clip / (norm + 1e-12)).clamp(max=1))
            optimizer.step_()
            to.clock.add_(1)

    def _watch(self, sizes: Tensor) -> None:
        """Keep where the first non-finite values of the task were, without reading them."""
        bad, clean = ~torch.isfinite(sizes), self.bad_step < 0
        self.bad_step.copy_(torch.where(clean & bad.any(), self.buffers.clock, self.bad_step))
        self.bad.copy_(torch.where(clean, bad, self.bad))

    def trouble(self) -> str | None:
        """What was not finite first, and when; None where all is well (waits for the device)."""
        step = self.bad_step.item()
        if step < 0:
            return None
        # in the order in which a step computes them: the first is the cause, the rest follow from it
        where = [name for name, bad in zip(self.watched, self.bad.tolist(), strict=True) if bad]
        return f"{where[0]} is not finite at step {step}"
