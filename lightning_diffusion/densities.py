r"""Where to learn: distributions over log-SNR (knob 1).

A density turns u in (0, 1), which rises with noise, into log_snr. Stratification, importance weights and changes
of density are written once, on u and log_prob. A density over time takes the schedule that time belongs to: the
objective's own unless it is given one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_diffusion.resume import RandomKey
from lightning_diffusion.schedules import Schedule


class Density(ABC):
    """A distribution over log-SNR."""

    @abstractmethod
    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        """The log-SNR that a share u of draws exceeds, float64, shape (B,) to (B,)."""

    @abstractmethod
    def log_prob(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        """Log-density per unit of log-SNR, shape (B,) to (B,)."""

    def draw(self, batch: int, schedule: Schedule, key: RandomKey) -> Tensor:
        """Log-SNRs of this rank's share of a batch, stratified over ranks and accumulation; float64 on the CPU."""
        u = key.stratified_uniform("noise level", batch).clamp(1e-12, 1 - 1e-12)
        return self.quantile(u, schedule)


@dataclass(frozen=True)
class LogNormalSigma(Density):
    """ln(sigma / alpha) ~ N(mean, std^2) (Karras et al. 2022, Table 1).

    Args:
        mean, std: P_mean and P_std; the default mean is for data of deviation 0.5: add ln(sigma_data / 0.5) for others.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"Found {self}; expected std > 0.")

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        normal: Tensor = torch.special.ndtri(u)
        return -2 * (self.mean + self.std * normal)

    def log_prob(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        z = (log_snr / -2 - self.mean) / self.std
        return -(z**2) / 2 - math.log(2 * self.std * math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class UniformTime(Density):
    """t uniform on [0, 1], or on the entries of a table (Ho et al. 2020).

    Args:
        schedule: whose time is meant; None is the objective's own.
    """

    schedule: Schedule | None = None

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return (self.schedule or schedule).log_snr(u)

    def log_prob(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        return (self.schedule or schedule).uniform_log_prob(log_snr)
