"""The forward process and what the U-Net is asked for: x_t = alpha_t x_0 + sigma_t noise, target noise or velocity."""

from __future__ import annotations

import torch

from ..errors import InputError

PREDICTIONS = ("epsilon", "v_prediction")


class Diffusion:
    """The variance-preserving process of a pipeline's scheduler, as fp32 tables of T timesteps on one device.

    alpha_t**2 + sigma_t**2 = 1; SNR_t = (alpha_t / sigma_t)**2, which is exactly 0 at the last step of a schedule that is
    rescaled to zero terminal SNR. Raises InputError for flow-matching and other processes.
    """

    def __init__(self, scheduler, device: torch.device, min_snr: float | None = None):
        self.prediction = scheduler.config.get("prediction_type", None)
        if self.prediction not in PREDICTIONS or "beta_schedule" not in scheduler.config:
            raise InputError(
                f"the scheduler must be a DDPM-like one that predicts {' or '.join(PREDICTIONS)}, got "
                f"{type(scheduler).__name__} with {self.prediction!r}; use a Stable Diffusion 1.5, 2.1 or XL model"
            )
        from diffusers import DDPMScheduler

        # all schedulers of one configuration share the process; this one has its exact table
        cumulative = DDPMScheduler.from_config(scheduler.config).alphas_cumprod.double()
        self.steps = len(cumulative)
        self.alpha = cumulative.sqrt().float().to(device)
        self.sigma = (1 - cumulative).sqrt().float().to(device)
        self.weight = self._weights(cumulative / (1 - cumulative), min_snr).float().to(device)

    def _weights(self, snr: torch.Tensor, gamma: float | None) -> torch.Tensor:
        """min(SNR, gamma) / SNR for noise, min(SNR, gamma) / (SNR + 1) for velocity (arXiv 2303.09556), by timestep."""
        if gamma is None:
            return torch.ones_like(snr)
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1)
        return snr.clamp(max=gamma) / (snr + 1)

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, target) for clean latents and noise [batch, c, h, w] and timesteps [batch] int64, all fp32."""
        alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        noisy = alpha * clean + sigma * noise
        return noisy, noise if self.prediction == "epsilon" else alpha * noise - sigma * clean

    def loss(self, predicted: torch.Tensor, target: torch.Tensor, t: torch.Tensor, share: torch.Tensor | None = None):
        """The weighted mean square error, a scalar in fp32; `share` [batch] fp32 weighs the pictures, None counts each as 1."""
        weight = self.weight[t] if share is None else self.weight[t] * share
        return (weight * (predicted.float() - target).square().mean((1, 2, 3))).mean()
