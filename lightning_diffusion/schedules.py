r"""Schedules: how signal and noise trade off along time (see `processes` for the convention). Tables are float64."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.processes import Schedule as Schedule
from lightning_diffusion.processes import StraightPath, VarianceExploding, VariancePreserving

_ROUNDING = (
    1e-4  # the first and last entries of a table stay inside it when their log-SNR is rounded to float32
)


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

    def time(self, log_snr: Tensor) -> Tensor:
        low, high = self._ends
        return ((log_snr / (-2 * self.rho)).exp() - low) / (high - low)

    def uniform_log_prob(self, log_snr: Tensor) -> Tensor:
        low, high = self._ends
        inside = (log_snr / -2 <= math.log(self.sigma_max)) & (log_snr / -2 >= math.log(self.sigma_min))
        log_prob = -log_snr / (2 * self.rho) - math.log(2 * self.rho * (high - low))
        return log_prob.where(inside, -math.inf)

    def sampling_times(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps, dtype=torch.float64)


@dataclass(frozen=True)
class GeometricSchedule(VarianceExploding):
    """ln sigma linear in t from sigma_min to sigma_max (Song et al. 2021, "VE").

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"Found {self}; expected 0 < sigma_min < sigma_max.")

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min))

    def time(self, log_snr: Tensor) -> Tensor:
        return (log_snr / -2 - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)

    def uniform_log_prob(self, log_snr: Tensor) -> Tensor:
        inside = (log_snr / -2 <= math.log(self.sigma_max)) & (log_snr / -2 >= math.log(self.sigma_min))
        height = -math.log(2 * math.log(self.sigma_max / self.sigma_min))
        return torch.full_like(log_snr, height).where(inside, -math.inf)

    def sampling_times(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps, dtype=torch.float64)


@dataclass(frozen=True)
class ContinuousCosineSchedule(VariancePreserving):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): pure data at t = 0, pure noise at t = 1 (Salimans & Ho 2022)."""

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.pi / 2 * t).tan().log()

    def time(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).exp().atan() * 2 / math.pi

    def uniform_log_prob(self, log_snr: Tensor) -> Tensor:
        return -math.log(2 * math.pi) - _log_cosh(log_snr / 2)

    def __call__(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel((math.pi / 2 * (1 - t)).sin(), (math.pi / 2 * t).sin())


@dataclass(frozen=True)
class FlowSchedule(StraightPath):
    """alpha = 1 - t', sigma = t', t' = shift t / (1 + (shift - 1) t) (Lipman et al. 2023; Esser et al. 2024, eq. 23).

    Args:
        shift: above 1 moves time to more noise, as larger images want: log-SNR falls by 2 ln(shift).

    Raises:
        ValueError: unless shift > 0.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"Found {self}; expected shift > 0.")

    def __call__(self, t: Tensor) -> NoiseLevel:
        total = 1 + (self.shift - 1) * t
        return NoiseLevel((1 - t) / total, self.shift * t / total)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * ((1 - t).log() - t.log() - math.log(self.shift))

    def time(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2 - math.log(self.shift)).sigmoid()

    def uniform_log_prob(self, log_snr: Tensor) -> Tensor:
        half = log_snr / 2 + math.log(self.shift)
        return logsigmoid(half) + logsigmoid(-half) - math.log(2)


class DiscreteSchedule(VariancePreserving):
    """A table of num_steps levels, t = 1..num_steps in the papers, index t - 1 here.

    Attributes:
        num_steps: length T of the table.
        zero_terminal_snr: rescale so that the last level is pure noise (Lin et al. 2024, algorithm 1).

    Raises:
        ValueError: for fewer than two steps, or unless 0 < beta_min < beta_max < 1.
    """

    num_steps: int
    zero_terminal_snr: bool

    @abstractmethod
    def plain_betas(self) -> Tensor:
        """The paper's table before any rescaling, float64, shape (num_steps,)."""

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ValueError(f"Found num_steps={self.num_steps}; expected at least 2.")
        low, high = getattr(self, "beta_min", 1e-9), getattr(self, "beta_max", 0.999)
        if not 0 < low < high < 1:
            raise ValueError(f"Found {self}; expected 0 < beta_min < beta_max < 1.")

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
        return self.log_snrs.to(t.device, non_blocking=True)[self.index(t)]

    def time(self, log_snr: Tensor) -> Tensor:
        finite = self.log_snrs.clamp(min=-1e3).to(log_snr, non_blocking=True)
        entry = torch.searchsorted(-(finite[:-1] + finite[1:]) / 2, -log_snr)
        return (entry.to(log_snr) + 0.5) / self.num_steps

    def uniform_log_prob(self, log_snr: Tensor) -> Tensor:
        """Each entry's mass 1/T spread over its cell, which reaches half-way to its neighbours."""
        finite = self.log_snrs[: self.num_steps - self.reaches_zero_snr].to(log_snr, non_blocking=True)
        gaps = finite[:-1] - finite[1:]
        cells = torch.cat([gaps[:1], gaps[:-1] + gaps[1:], gaps[-1:]]) / 2
        borders = (finite[:-1] + finite[1:]) / 2
        cell = torch.searchsorted(-borders, -log_snr)
        inside = (log_snr <= finite[0] + _ROUNDING) & (log_snr >= finite[-1] - _ROUNDING)
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
        return _ramp(self, self.beta_min, self.beta_max)


@dataclass(frozen=True)
class ScaledLinearSchedule(DiscreteSchedule):
    """sqrt(beta) linear in t (Rombach et al. 2022, latent diffusion)."""

    num_steps: int = 1000
    beta_min: float = 0.00085
    beta_max: float = 0.012
    zero_terminal_snr: bool = False

    def plain_betas(self) -> Tensor:
        return _ramp(self, self.beta_min**0.5, self.beta_max**0.5) ** 2


@dataclass(frozen=True)
class ExponentialSchedule(DiscreteSchedule):
    """ln beta linear in t."""

    num_steps: int = 1000
    beta_min: float = 1e-4
    beta_max: float = 0.02
    zero_terminal_snr: bool = False

    def plain_betas(self) -> Tensor:
        return _ramp(self, math.log(self.beta_min), math.log(self.beta_max)).exp()


@dataclass(frozen=True)
class SigmoidSchedule(DiscreteSchedule):
    """beta a sigmoid of t over [-6, 6] (Xu et al. 2022, GeoDiff)."""

    num_steps: int = 1000
    beta_min: float = 1e-4
    beta_max: float = 0.02
    zero_terminal_snr: bool = False

    def plain_betas(self) -> Tensor:
        rise = torch.linspace(-6, 6, self.num_steps, dtype=torch.float64).sigmoid()
        return self.beta_min + rise * (self.beta_max - self.beta_min)


@dataclass(frozen=True)
class CosineSchedule(DiscreteSchedule):
    """abar(t) = cos^2((t/T + s) / (1 + s) pi/2), s = 0.008, beta at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""

    num_steps: int = 1000
    zero_terminal_snr: bool = False

    def plain_betas(self) -> Tensor:
        t = torch.arange(self.num_steps + 1, dtype=torch.float64) / self.num_steps
        abar = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def _ramp(schedule: DiscreteSchedule, first: float, last: float) -> Tensor:
    return torch.linspace(first, last, schedule.num_steps, dtype=torch.float64)


def _log_cosh(x: Tensor) -> Tensor:
    return x.abs() + (-2 * x.abs()).exp().log1p() - math.log(2)


def _with_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale alpha_t so that the first stays and the last is 0 (Lin et al. 2024, algorithm 1)."""
    alpha = (1 - betas).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    ratios = torch.cat([alpha[:1], alpha[1:] / alpha[:-1]])
    return 1 - ratios**2
