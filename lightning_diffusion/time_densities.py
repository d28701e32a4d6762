r"""Densities over time: t in (0, 1) is drawn, its log-SNR follows from the schedule (see `densities`).

    p(log_snr) = p(t) / |d log_snr / dt|

The schedule is the one that time belongs to: the objective's own unless a density is given another.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import log_ndtr, ndtri

from lightning_diffusion.densities import Density
from lightning_diffusion.schedules import Schedule


class TimeDensity(Density):
    """A density over t, defined by its quantile and log-density there."""

    schedule: Schedule | None

    @abstractmethod
    def time_quantile(self, u: Tensor) -> Tensor:
        """t that a share u of draws is below, shape (B,) to (B,)."""

    @abstractmethod
    def time_log_prob(self, t: Tensor) -> Tensor:
        """Log-density over t, shape (B,) to (B,)."""

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return (self.schedule or schedule).log_snr(self.time_quantile(u))

    def log_prob(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        of = self.schedule or schedule
        t = of.time(log_snr).clamp(1e-15, 1 - 1e-15)
        return self.time_log_prob(t) + of.uniform_log_prob(log_snr)


@dataclass(frozen=True)
class UniformTime(TimeDensity):
    """t uniform on [0, 1], or on the entries of a table (Ho et al. 2020)."""

    schedule: Schedule | None = None

    def time_quantile(self, u: Tensor) -> Tensor:
        return u

    def time_log_prob(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


@dataclass(frozen=True)
class LogitNormalTime(TimeDensity):
    """logit t ~ N(mean, std^2) (Esser et al. 2024, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        _check_std(self, self.std)

    def time_quantile(self, u: Tensor) -> Tensor:
        logit: Tensor = self.mean + self.std * ndtri(u)
        return logit.sigmoid()

    def time_log_prob(self, t: Tensor) -> Tensor:
        return _log_normal((t.logit() - self.mean) / self.std) - math.log(self.std) - (t * (1 - t)).log()


@dataclass(frozen=True)
class NormalTime(TimeDensity):
    """t ~ N(mean, std^2), cut to [0, 1]."""

    mean: float = 0.5
    std: float = 0.25
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        _check_std(self, self.std)

    @property
    def _shares(self) -> tuple[float, float]:
        ends = torch.tensor([-self.mean, 1 - self.mean], dtype=torch.float64) / self.std
        low, high = log_ndtr(ends).exp().tolist()
        return low, high

    def time_quantile(self, u: Tensor) -> Tensor:
        low, high = self._shares
        t: Tensor = self.mean + self.std * ndtri(low + u * (high - low))
        return t.clamp(0, 1)

    def time_log_prob(self, t: Tensor) -> Tensor:
        low, high = self._shares
        return _log_normal((t - self.mean) / self.std) - math.log(self.std * (high - low))


@dataclass(frozen=True)
class CosMapTime(TimeDensity):
    """The density that gives a flow the log-SNRs of a cosine schedule (Esser et al. 2024, eq. 21)."""

    schedule: Schedule | None = None

    def time_quantile(self, u: Tensor) -> Tensor:
        return 1 - 1 / ((math.pi / 2 * u).tan() + 1)

    def time_log_prob(self, t: Tensor) -> Tensor:
        return math.log(2) - (math.pi * (1 - 2 * t + 2 * t**2)).log()


@dataclass(frozen=True)
class ModeTime(TimeDensity):
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u), heavy-tailed about the middle (Esser et al. 2024, eq. 20).

    Args:
        scale: from -1 (ends) over 0 (uniform) to 2 / (pi - 2) (middle).
    """

    scale: float = 1.29
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"Found {self}; expected a scale from -1 to 2 / (pi - 2) = 1.7519.")

    def time_quantile(self, u: Tensor) -> Tensor:
        return self._time(1 - u)

    def _time(self, u: Tensor) -> Tensor:
        return 1 - u - self.scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)

    def time_log_prob(self, t: Tensor) -> Tensor:
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):
            middle = (low + high) / 2
            later = self._time(middle) > t
            low, high = middle.where(later, low), high.where(later, middle)
        slope = 1 + self.scale - self.scale * math.pi / 2 * (math.pi * low).sin()
        return -slope.log()


def _log_normal(z: Tensor) -> Tensor:
    return -(z**2) / 2 - math.log(2 * math.pi) / 2


def _check_std(density: Density, std: float) -> None:
    if std <= 0:
        raise ValueError(f"Found {density}; expected std > 0.")
