"""The forward process x_t = alpha_t x_0 + sigma_t noise, and the target of the U-Net: the noise or the velocity."""

from __future__ import annotations

import torch

from ..errors import InputError

PREDICTIONS = ("epsilon", "v_prediction")


class Diffusion:
    """The variance-preserving process of a pipeline's scheduler, as fp32 tables of T timesteps on one device.

    alpha_t**2 + sigma_t**2 = 1, and SNR_t = (alpha_t / sigma_t)**2. A schedule that is rescaled to zero terminal SNR has
    exactly 0 at its last timestep. Raises InputError for flow-matching and other processes.
    """

    def __init__(self, scheduler, device: torch.device, min_snr: float | None = None):
        self.prediction = scheduler.config.get("prediction_type", None)
        if self.prediction not in PREDICTIONS or "beta_schedule" not in scheduler.config:
            raise InputError(
                f"the scheduler must be a DDPM-like one that predicts {' or '.join(PREDICTIONS)}, got "
                f"{type(scheduler).__name__} with {self.prediction!r}; use a Stable Diffusion 1.5, 2.1 or XL model"
            )
        from diffusers import DDPMScheduler

        # all schedulers of one configuration have the same process; this one has its exact table
        cumulative = DDPMScheduler.from_config(scheduler.config).alphas_cumprod.double()
        self.steps = len(cumulative)
        self.alpha = cumulative.sqrt().float().to(device)
        self.sigma = (1 - cumulative).sqrt().float().to(device)
        self.weight = self._weights(cumulative / (1 - cumulative), min_snr).float().to(device)

    def _weights(self, snr: torch.Tensor, gamma: float | None) -> torch.Tensor:
        """The min-SNR weight of each timestep (arXiv 2303.09556).

        It is min(SNR, gamma) / SNR where the target is noise, and min(SNR, gamma) / (SNR + 1) where it is velocity.
        """
        if gamma is None:
            return torch.ones_like(snr)
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1)
        return snr.clamp(max=gamma) / (snr + 1)

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, target) in fp32, for clean latents and noise fp32 [batch, c, h, w] and timesteps int64 [batch]."""
        alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        noisy = alpha * clean + sigma * noise
        return noisy, noise if self.prediction == "epsilon" else alpha * noise - sigma * clean

    def loss(self, predicted: torch.Tensor, target: torch.Tensor, t: torch.Tensor, row_weights: torch.Tensor | None = None):
        """The weighted mean square error, a scalar in fp32. row_weights: fp32 [batch], None for ones."""
        weight = self.weight[t] if row_weights is None else self.weight[t] * row_weights
        return (weight * (predicted.float() - target).square().mean((1, 2, 3))).mean()
