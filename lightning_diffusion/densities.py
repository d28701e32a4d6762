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
from typing import ClassVar

import torch
from torch import Tensor

from lightning_diffusion.resume import RandomKey
from lightning_diffusion.schedules import Schedule


class Density(ABC):
    """A distribution over log-SNR.

    `stands_for_another`: draws are not from `log_prob`, which is what they mean; `importance` makes up for it.
    `learns`: wants to be told of the gradients that its draws gave.
    """

    stands_for_another: ClassVar[bool] = False
    learns: ClassVar[bool] = False

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

    def observe(self, log_snr: Tensor, gradient: Tensor, schedule: Schedule, key: RandomKey) -> None:
        """Take note of squared gradients at drawn levels, both of shape (B,); asked only of one that `learns`."""
        raise NotImplementedError(f"{self} does not learn.")

    def check(self, schedule: Schedule) -> None:
        """Raise a ValueError if no draw falls into the range of the schedule."""
        drawn = self.quantile(_spread(1000), schedule)
        low, high = sorted(schedule.log_snr(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist())
        if not ((drawn >= low - 1e-6) & (drawn <= high + 1e-6)).any():
            raise ValueError(
                f"{self} draws log-SNRs from {drawn.min():.3g} to {drawn.max():.3g}, but {schedule} goes from "
                f"{low:.3g} to {high:.3g}: no level that sampling passes through would be trained. Move the density, "
                "or the schedule's range, to where the other is."
            )


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
        ValueError: if there is nothing between them, when drawing; for a density that stands for another.
    """

    density: Density
    min_log_snr: float = -10.0
    max_log_snr: float = 10.0

    def __post_init__(self) -> None:
        check_plain(self, self.density)

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

    Raises:
        ValueError: if one of them stands for another already, or, by `check`, if `drawn` leaves out what is intended.
    """

    drawn: Density
    intended: Density
    stands_for_another = True

    def __post_init__(self) -> None:
        check_plain(self, self.drawn)
        check_plain(self, self.intended)

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return self.drawn.quantile(u, schedule)

    def log_prob(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        return self.intended.log_prob(log_snr, schedule)

    def importance(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        intended = self.intended.log_prob(log_snr, schedule)
        ratio = (intended - self.drawn.log_prob(log_snr, schedule)).exp()
        return ratio.where(intended > -math.inf, 0.0)

    def check(self, schedule: Schedule) -> None:
        """Also raise if more than a thousandth of what is intended is never drawn."""
        super().check(schedule)
        intended = self.intended.quantile(_spread(10_000), schedule)
        missed = intended[self.drawn.log_prob(intended, schedule) == -math.inf]
        if len(missed) > 10:
            raise ValueError(
                f"{self.drawn} misses {len(missed) / 10_000:.1%} of {self.intended}, between log-SNR "
                f"{missed.min():.3g} and {missed.max():.3g}: those levels would not be trained. Draw from a density "
                "that covers them, or write Truncated(...) around the intended one."
            )


def intended_by(density: Density) -> Density:
    """What its draws mean: the density itself, unless it stands for another."""
    intended: Density = getattr(density, "intended", density)
    return intended


def check_plain(outer: Density, inner: Density) -> None:
    """Raise a ValueError if `inner`, a part of `outer`, draws from another density than its own."""
    if inner.stands_for_another:
        raise ValueError(
            f"{type(outer).__name__} was given {inner}, whose draws stand for another density; expected one that "
            "means what it draws: write the intended density itself."
        )


def _spread(n: int) -> Tensor:
    """Middles of n equal parts of (0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def _inside(log_snr: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    return (log_snr / -2 >= math.log(sigma_min)) & (log_snr / -2 <= math.log(sigma_max))


def _check_range(density: Density, sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"Found {density}; expected 0 < sigma_min < sigma_max.")
