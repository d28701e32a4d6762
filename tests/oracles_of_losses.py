"""A network that plays a denoiser under any objective, and its losses."""

from __future__ import annotations

import torch
from torch import nn

from lightning_diffusion.noise_level import per_sample


class Playing(nn.Module):
    """Puts out what `objective` makes `denoiser(x_t, level)` of, at levels that are known to it."""

    def __init__(self, denoiser, objective, level):
        super().__init__()
        self.denoiser, self.objective, self.level = denoiser, objective, level

    def forward(self, x, c_noise, **_):
        preconditioning = self.objective.preconditioning
        x_t = x / per_sample(preconditioning.c_in(self.level), x)
        x0 = self.denoiser(x_t, self.level)
        alpha, sigma = (per_sample(part, x) for part in self.level)
        return preconditioning.residual(x0, (x_t - alpha * x0) / sigma, self.level)


def losses_at(objective, denoiser, draw, log_snr, n=20_000, seed=0):
    """Level (n,) and weighted losses (n,) of samples `draw(n, generator)`, all at one log-SNR."""
    generator = torch.Generator().manual_seed(seed)
    x0 = draw(n, generator)
    level = objective.schedule.at(torch.full((n,), log_snr))
    noise = torch.randn(x0.shape, generator=generator)
    with torch.no_grad():
        return level, objective.loss_at(Playing(denoiser, objective, level), x0, noise, level).per_sample
