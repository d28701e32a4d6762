r"""The noise level, the one coordinate of everything in this package.

    x_t = alpha x_0 + sigma eps,   eps ~ N(0, I)         x_t, x_0, eps of shape (B, ...)
    SNR = alpha^2 / sigma^2,       log_snr = ln SNR      alpha, sigma, log_snr of shape (B,)

alpha = 0 (pure noise) and sigma = 0 (clean data) are legal: formulas downstream are written in
(alpha, sigma), not in their ratio, and stay finite there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shape a coefficient (B,) as (B, 1, ..., 1), to multiply x of shape (B, ...): the only broadcast here."""
    return coefficient.reshape(-1, *(1,) * (x.ndim - 1))


class NoiseLevel(NamedTuple):
    """How much signal and how much noise: x_t = alpha x_0 + sigma eps. Both of shape (B,)."""

    alpha: Tensor
    sigma: Tensor

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, shape (B,); infinite at sigma = 0."""
        return (self.alpha / self.sigma) ** 2

    @property
    def log_snr(self) -> Tensor:
        """ln(alpha^2 / sigma^2), shape (B,); -inf at alpha = 0, +inf at sigma = 0."""
        return 2 * (self.alpha.log() - self.sigma.log())

    def variance(self, sigma_data: float) -> Tensor:
        """Var(x_t) = alpha^2 sigma_data^2 + sigma^2 for data of deviation `sigma_data`, shape (B,)."""
        return (self.alpha * sigma_data) ** 2 + self.sigma**2

    def diffuse(self, x0: Tensor, noise: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma eps, shape (B, ...)."""
        return per_sample(self.alpha, x0) * x0 + per_sample(self.sigma, noise) * noise

    def to(self, like: Tensor) -> NoiseLevel:
        """The same level on the device and in the dtype of `like`."""
        return NoiseLevel(*(part.to(like, non_blocking=True) for part in self))

    def expand(self, batch: int) -> NoiseLevel:
        """The same level for every sample of a batch: from shape () or (1,) to (batch,)."""
        return NoiseLevel(*(part.expand(batch) for part in self))


def cat(levels: list[NoiseLevel]) -> NoiseLevel:
    """Join noise levels along the batch."""
    return NoiseLevel(*(torch.cat(parts) for parts in zip(*levels, strict=True)))
