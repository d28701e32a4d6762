r"""The last term of a likelihood bound, -ln p(x_0 | x_t) at the greatest log-SNR, x_t = alpha x_0 + sigma eps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_diffusion.analysis.measuring import Measured, Units, noise_error
from lightning_diffusion.noise_level import NoiseLevel

_REACH = 10.0  # standard deviations of x_t beyond which a discrete value is out of the question, e^-50


class Decoder(ABC):
    """p(x_0 | x_t) at the last, least noisy level."""

    @abstractmethod
    def __call__(self, batch: Measured, noise: Tensor, level: NoiseLevel) -> Tensor:
        """-ln p(x_0 | x_t) for x_t = alpha x_0 + sigma noise at one level (1,), float64 on the CPU, shape (B,)."""

    @abstractmethod
    def last_log_snr(self, batch: Measured) -> float:
        """Where it does best to take over."""


@dataclass(frozen=True)
class GaussianDecoder(Decoder):
    """N(x_0; x_0_hat, I / SNR): for data with a density.

    Args:
        bin_width: 1 for the density itself; the width of a bin, 2/255 for 8-bit images in [-1, 1], for density times
            width, which compares with discrete data (log2(255/2) = 6.994 bits more).
    """

    bin_width: float = 1.0

    def __post_init__(self) -> None:
        if not self.bin_width > 0:
            raise ValueError(f"Found {self}; expected bin_width > 0, such as 1 or 2/255.")

    def __call__(self, batch: Measured, noise: Tensor, level: NoiseLevel) -> Tensor:
        width = (_known(batch).scale.double() * self.bin_width).expand(batch.x0.shape[1:])
        error = noise_error(batch, noise, level.expand(len(noise)))
        return error / 2 + gaussian_offset(level.log_snr.item(), noise[0].numel()) - width.log().sum().cpu()

    def last_log_snr(self, batch: Measured) -> float:
        """14, noise of 0.001: the finer the better, as far as the denoiser knows the density."""
        return 14.0


@dataclass(frozen=True)
class DiscreteDecoder(Decoder):
    """softmax over k of -(x_t - alpha x_k)^2 / (2 sigma^2), in every dimension: for data on a grid of values.

    Args:
        num_values, low, high: x_k, evenly spaced from low to high; by default 8-bit images in [-1, 1].

    Raises:
        ValueError: for fewer than two values, or data that are not on the grid.
    """

    num_values: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.num_values < 2 or not self.low < self.high:
            raise ValueError(f"Found {self}; expected at least two values and low < high.")

    def __call__(self, batch: Measured, noise: Tensor, level: NoiseLevel) -> Tensor:
        own, step = self._place(batch)
        sigma = (level.sigma / level.alpha).double().to(noise.device) / step  # in steps of the grid
        at = sigma * noise.double()
        reach = min(self.num_values - 1, math.ceil((at.abs().max() + _REACH * sigma.max()).item()))
        total = torch.zeros_like(at)
        for other in (j for j in range(-reach, reach + 1) if j):
            logit = (2 * at * other - other**2) / (2 * sigma**2)
            there = (own + other >= 0) & (own + other < self.num_values)
            total = torch.logaddexp(total, logit.where(there, -math.inf))
        return total.flatten(1).sum(1).cpu()

    def last_log_snr(self, batch: Measured) -> float:
        """Noise of a third of a step: with less, what counts is how well the denoiser rounds to the grid; few do.

        A denoiser that does not round at all loses 0.01 bits there, 0.08 at a quarter, nothing at a half.
        """
        _, step = self._place(batch)
        return -2 * (step.log().mean().item() - math.log(3))

    def _place(self, batch: Measured) -> tuple[Tensor, Tensor]:
        """The number of each element's value, shape of x_0, and the grid's step in x_0's units."""
        scale, shift = _known(batch)
        step = scale.double() * ((self.high - self.low) / (self.num_values - 1))
        place = (batch.x0.double() - (scale.double() * self.low + shift)) / step
        own = place.round().clamp(0, self.num_values - 1)
        off = (place - own).abs().max().item()
        if off > 0.05:
            raise ValueError(
                f"Found data {off:.3g} steps off the {self.num_values} values from {self.low:g} to {self.high:g}; "
                "expected data on them: give num_values, low and high of the data, or use GaussianDecoder."
            )
        return own, step


def gaussian_offset(log_snr: float, dimensions: int) -> float:
    """D/2 ln(2 pi / SNR), in nats."""
    return dimensions / 2 * (math.log(2 * math.pi) - log_snr)


def _known(batch: Measured) -> Units:
    if batch.units is None:
        raise ValueError(
            "Found a representation that does more than scale and shift each element of an image; expected one such as "
            "Identity or Standardize. For bits per latent dimension, encode the data and call likelihood_bound("
            "module.denoiser(), encoded)."
        )
    return batch.units
