r"""What every noise schedule can do, and the three scalings of one process.

    t        time in [0, 1], 0 = least noise, 1 = most noise      shape (B,)
    log_snr  ln(alpha^2 / sigma^2), falls with t                  shape (B,)

A schedule is one process with two maps, `schedule(t)` and `schedule.at(log_snr)`. Its scaling is one of
variance preserving (alpha^2 + sigma^2 = 1), variance exploding (alpha = 1) and straight path (alpha + sigma = 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_diffusion.noise_level import NoiseLevel


class Schedule(ABC):
    """A noise process, defined by its log-SNR along time and its scaling."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Log-SNR at time t in [0, 1], shape (B,) to (B,)."""

    @abstractmethod
    def at(self, log_snr: Tensor) -> NoiseLevel:
        """The level of this process at a log-SNR; infinite ones are legal."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """The time t in [0, 1] of a log-SNR, the inverse of `log_snr`; of a table the middle of the nearest entry."""

    @abstractmethod
    def uniform_log_prob(self, log_snr: Tensor) -> Tensor:
        """Log-density over log-SNR of a uniform t: -ln |d log_snr / dt|; -inf outside the range."""

    def __call__(self, t: Tensor) -> NoiseLevel:
        """The level at time t, shape (B,)."""
        return self.at(self.log_snr(t))

    def sampling_times(self, num_steps: int) -> Tensor:
        """Times at which a sampler evaluates the denoiser, from noise to data, float64, shape (num_steps,)."""
        return 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps

    def sampling_levels(self, num_steps: int) -> NoiseLevel:
        """Levels of `sampling_times` followed by clean data, float64, both of shape (num_steps + 1,)."""
        level = self(self.sampling_times(num_steps))
        return NoiseLevel(torch.cat([level.alpha, torch.ones(1)]), torch.cat([level.sigma, torch.zeros(1)]))

    @property
    def reaches_zero_snr(self) -> bool:
        """Whether the data are gone altogether at t = 1 (zero terminal SNR)."""
        return bool(self(torch.ones(1, dtype=torch.float64)).alpha == 0)


class VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1."""

    def at(self, log_snr: Tensor) -> NoiseLevel:
        return NoiseLevel(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())


class StraightPath(Schedule):
    """alpha + sigma = 1: the straight paths of flow matching."""

    def at(self, log_snr: Tensor) -> NoiseLevel:
        return NoiseLevel((log_snr / 2).sigmoid(), (-log_snr / 2).sigmoid())


class VarianceExploding(Schedule):
    """alpha = 1."""

    def at(self, log_snr: Tensor) -> NoiseLevel:
        return NoiseLevel(torch.ones_like(log_snr), (log_snr / -2).exp())
