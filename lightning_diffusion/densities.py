r"""Where to learn: distributions over log-SNR (knob 1).

A density turns u in (0, 1), which rises with noise, into log_snr. Stratification, importance weights and changes
of density are written once, on u and log_prob. A density over time takes the schedule that time belongs to: the
objective's own unless it is given one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

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

    def share_above(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        """The inverse of `quantile`, the share of draws above a log-SNR, by bisection; float64, shape (B,)."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.quantile(middle.clamp(1e-15, 1 - 1e-15), schedule) > log_snr
            low, high = middle.where(above, low), high.where(above, middle)
        return (low + high) / 2

    def importance(self, log_snr: Tensor, schedule: Schedule) -> Tensor | None:
        """Weights (B,) that make draws stand for the intended density; None where they are drawn from it."""
        return None

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
class UniformSigma(Density):
    """sigma / alpha uniform in [sigma_min, sigma_max]."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _check_range(self, self.sigma_min, self.sigma_max)

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return -2 * (self.sigma_min + u * (self.sigma_max - self.sigma_min)).log()

    def log_prob(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        log_prob = -log_snr / 2 - math.log(2 * (self.sigma_max - self.sigma_min))
        return log_prob.where(_inside(log_snr, self.sigma_min, self.sigma_max), -math.inf)


@dataclass(frozen=True)
class LogUniformSigma(Density):
    """ln(sigma / alpha) uniform in [ln sigma_min, ln sigma_max]."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _check_range(self, self.sigma_min, self.sigma_max)

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return -2 * (math.log(self.sigma_min) + u * math.log(self.sigma_max / self.sigma_min))

    def log_prob(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        height = -math.log(2 * math.log(self.sigma_max / self.sigma_min))
        inside = _inside(log_snr, self.sigma_min, self.sigma_max)
        return torch.full_like(log_snr, height).where(inside, -math.inf)


@dataclass(frozen=True)
class Truncated(Density):
    """Another density between two log-SNRs.

    Args:
        density: what is cut.
        min_log_snr, max_log_snr: where.

    Raises:
        ValueError: when drawing, if there is nothing between them.
    """

    density: Density
    min_log_snr: float = -10.0
    max_log_snr: float = 10.0

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        low, high = _shares(self, schedule)
        return self.density.quantile(low + u * (high - low), schedule)

    def log_prob(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        low, high = _shares(self, schedule)
        log_prob = self.density.log_prob(log_snr, schedule) - math.log(high - low)
        return log_prob.where((log_snr >= self.min_log_snr) & (log_snr <= self.max_log_snr), -math.inf)


@lru_cache
def _shares(cut: Truncated, schedule: Schedule) -> tuple[float, float]:
    ends = torch.tensor([cut.max_log_snr, cut.min_log_snr], dtype=torch.float64)
    low, high = cut.density.share_above(ends, schedule).tolist()
    if high - low < 1e-9:
        raise ValueError(
            f"{cut.density} has no mass between log-SNR {cut.min_log_snr} and {cut.max_log_snr}."
        )
    return low, high


@dataclass(frozen=True)
class Importance(Density):
    """Draws from one density what another intends: the expected gradient is the other's.

    Args:
        drawn: where samples fall; positive wherever `intended` is.
        intended: what the training means.
    """

    drawn: Density
    intended: Density

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return self.drawn.quantile(u, schedule)

    def log_prob(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        return self.intended.log_prob(log_snr, schedule)

    def importance(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        return (self.intended.log_prob(log_snr, schedule) - self.drawn.log_prob(log_snr, schedule)).exp()


def _inside(log_snr: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    return (log_snr / -2 >= math.log(sigma_min)) & (log_snr / -2 <= math.log(sigma_max))


def _check_range(density: Density, sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"Found {density}; expected 0 < sigma_min < sigma_max.")
