r"""Schedules: how signal and noise trade off along time.

    t        time in [0, 1], 0 = least noise, 1 = most noise      shape (B,)
    log_snr  ln(alpha^2 / sigma^2), falls with t                  shape (B,)

A schedule is one process with two maps, `schedule(t)` and `schedule.at(log_snr)`. Its scaling is one of
variance preserving (alpha^2 + sigma^2 = 1) or variance exploding (alpha = 1). Tables are float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

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


class VarianceExploding(Schedule):
    """alpha = 1."""

    def at(self, log_snr: Tensor) -> NoiseLevel:
        return NoiseLevel(torch.ones_like(log_snr), (-log_snr / 2).exp())


@dataclass(frozen=True)
class EDMSchedule(VarianceExploding):
    """sigma(t)^(1/rho) linear in t from sigma_min to sigma_max (Karras et al. 2022, eq. 5).

    The range is the sampler's; training draws from its own density. rho = 1 is linear in sigma.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and rho > 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max or self.rho <= 0:
            raise ValueError(f"Found {self}; expected 0 < sigma_min < sigma_max and rho > 0.")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def log_snr(self, t: Tensor) -> Tensor:
        low, high = self._ends
        return -2 * self.rho * (low + t * (high - low)).log()

    def uniform_log_prob(self, log_snr: Tensor) -> Tensor:
        low, high = self._ends
        inside = (log_snr / -2 <= math.log(self.sigma_max)) & (log_snr / -2 >= math.log(self.sigma_min))
        log_prob = -log_snr / (2 * self.rho) - math.log(2 * self.rho * (high - low))
        return log_prob.where(inside, -math.inf)

    def sampling_times(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps, dtype=torch.float64)


class DiscreteSchedule(VariancePreserving):
    """A table of num_steps levels, t = 1..num_steps in the papers, index t - 1 here.

    Attributes:
        num_steps: length T of the table.
        zero_terminal_snr: rescale so that the last level is pure noise (Lin et al. 2024, algorithm 1).

    Raises:
        ValueError: for fewer than two steps, or betas outside (0, 1).
    """

    num_steps: int
    zero_terminal_snr: bool

    @abstractmethod
    def plain_betas(self) -> Tensor:
        """The paper's table before any rescaling, float64, shape (num_steps,)."""

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ValueError(f"Found num_steps={self.num_steps}; expected at least 2.")
        if not bool(((self.plain_betas() > 0) & (self.plain_betas() < 1)).all()):
            raise ValueError(f"Found a beta outside (0, 1) in {self}; expected 0 < beta_min < beta_max < 1.")

    @cached_property
    def betas(self) -> Tensor:
        """Noise added at each step, float64, shape (num_steps,)."""
        betas = self.plain_betas()
        return _with_zero_terminal_snr(betas) if self.zero_terminal_snr else betas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar_t = prod(1 - beta) = alpha_t^2, float64, shape (num_steps,)."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def log_snrs(self) -> Tensor:
        """Log-SNR of each entry, float64, falling, shape (num_steps,); the last is -inf at zero terminal SNR."""
        return self.alphas_cumprod.log() - (-self.alphas_cumprod).log1p()

    def index(self, t: Tensor) -> Tensor:
        """The entry of time t: floor(t T), at most T - 1."""
        return (t * self.num_steps).long().clamp(0, self.num_steps - 1)

    def log_snr(self, t: Tensor) -> Tensor:
        return self.log_snrs.to(t.device)[self.index(t)]

    def uniform_log_prob(self, log_snr: Tensor) -> Tensor:
        """Each entry's mass 1/T spread over its cell, which reaches half-way to its neighbours."""
        finite = self.log_snrs[: self.num_steps - self.reaches_zero_snr].to(log_snr)
        gaps = finite[:-1] - finite[1:]
        cells = torch.cat([gaps[:1], gaps[:-1] + gaps[1:], gaps[-1:]]) / 2
        borders = (finite[:-1] + finite[1:]) / 2
        cell = torch.searchsorted(-borders, -log_snr)
        inside = (log_snr <= finite[0]) & (log_snr >= finite[-1])
        return (-(cells[cell] * self.num_steps).log()).where(inside, -math.inf)

    def sampling_times(self, num_steps: int) -> Tensor:
        """Evenly spaced entries ending with the last ("trailing", as Lin et al. 2024 advise), at their centres."""
        if num_steps > self.num_steps:
            raise ValueError(
                f"Found {num_steps} sampling steps; expected at most the {self.num_steps} of {self}."
            )
        last = torch.arange(num_steps, 0, -1) * self.num_steps / num_steps
        return (last.round().double() - 0.5) / self.num_steps


@dataclass(frozen=True)
class LinearSchedule(DiscreteSchedule):
    """beta linear in t (Ho et al. 2020)."""

    num_steps: int = 1000
    beta_min: float = 1e-4
    beta_max: float = 0.02
    zero_terminal_snr: bool = False

    def plain_betas(self) -> Tensor:
        if not self.beta_min < self.beta_max:
            raise ValueError(f"Found {self}; expected beta_min < beta_max.")
        return torch.linspace(self.beta_min, self.beta_max, self.num_steps, dtype=torch.float64)


@dataclass(frozen=True)
class CosineSchedule(DiscreteSchedule):
    """abar(t) = cos^2((t/T + s) / (1 + s) pi/2), s = 0.008, beta at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""

    num_steps: int = 1000
    zero_terminal_snr: bool = False

    def plain_betas(self) -> Tensor:
        t = torch.arange(self.num_steps + 1, dtype=torch.float64) / self.num_steps
        abar = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def _with_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale alpha_t so that the first stays and the last is 0 (Lin et al. 2024, algorithm 1)."""
    alpha = (1 - betas).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    ratios = torch.cat([alpha[:1], alpha[1:] / alpha[:-1]])
    return 1 - ratios**2
