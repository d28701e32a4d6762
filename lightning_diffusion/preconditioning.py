r"""How easy (knob 3): what the network sees and what it has to give.

    y_hat = c_skip x_t + c_out F(c_in x_t, c_noise)            y the target, F the network, coefficients (B,)
    V = alpha^2 sigma_data^2 + sigma^2 = Var(x_t)

The network regresses on the residual R = (y - c_skip x_t) / c_out. Under full preconditioning R is the same for
every target, R = (sigma x_0 / sigma_data - alpha sigma_data eps) / sqrt(V), of unit variance, uncorrelated with x_t
and finite at alpha = 0 and sigma = 0: the target then only names the space of a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_diffusion.noise_level import NoiseLevel, per_sample
from lightning_diffusion.schedules import DiscreteSchedule, Schedule
from lightning_diffusion.targets import X0, Epsilon, Space, Target


class Coefficients(NamedTuple):
    """Each of shape (B,)."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor
    c_noise: Tensor


class NoiseCoordinate(ABC):
    """How the network is told the noise level."""

    @abstractmethod
    def __call__(self, level: NoiseLevel) -> Tensor:
        """c_noise, shape (B,), finite at every level."""


@dataclass(frozen=True)
class LogSigma(NoiseCoordinate):
    """c_noise = ln(sigma / alpha) / 4, log-SNR held within [-20, 20] (Karras et al. 2022, Table 1)."""

    def __call__(self, level: NoiseLevel) -> Tensor:
        return level.log_snr.clamp(-20, 20) / -8


@dataclass(frozen=True)
class Timestep(NoiseCoordinate):
    """c_noise = index of the nearest table entry, 0..T-1, as a float; exact at zero terminal SNR too."""

    schedule: DiscreteSchedule
    _borders: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        entries = self.schedule.at(self.schedule.log_snrs)
        angles = torch.atan2(entries.sigma, entries.alpha)
        object.__setattr__(self, "_borders", ((angles[1:] + angles[:-1]) / 2).float())

    def __call__(self, level: NoiseLevel) -> Tensor:
        angle = torch.atan2(level.sigma, level.alpha)
        borders = self._borders.to(angle.device, non_blocking=True)
        return torch.searchsorted(borders, angle.float()).to(angle.dtype)


class Preconditioning(ABC):
    """c_in, c_skip, c_out and c_noise for a target and data of deviation sigma_data and zero mean."""

    target: Target
    sigma_data: float
    c_noise: NoiseCoordinate
    output_space: ClassVar[Space]
    """What the network's own error is an error of."""

    @abstractmethod
    def __call__(self, level: NoiseLevel) -> Coefficients:
        """The coefficients at a level."""

    @abstractmethod
    def c_in(self, level: NoiseLevel) -> Tensor:
        """The factor on x_t, shape (B,)."""

    @abstractmethod
    def residual(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """R = (y - c_skip x_t) / c_out, what the network regresses on, shape (B, ...)."""

    @abstractmethod
    def to_x0(self, output: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """x_0_hat from the network's output, shape (B, ...)."""

    @abstractmethod
    def check(self, schedule: Schedule) -> None:
        """Raise a ValueError if x_0 cannot be had from the output at some level of the schedule."""

    def determinant(self, space: Space, level: NoiseLevel) -> Tensor:
        """D of a space (see `targets`): errors are proportional to it at fixed x_t, shape (B,)."""
        of: dict[Space, Callable[[NoiseLevel], Tensor]] = {
            Space.DATA: lambda level: -level.sigma,
            Space.NOISE: lambda level: level.alpha,
            Space.RATIO: lambda level: torch.ones_like(level.alpha),
            Space.RESIDUAL: lambda level: -level.variance(self.sigma_data).sqrt() / self.sigma_data,
            Space.TARGET: self.target.determinant,
        }
        return of[space](level)


@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """Unit variance in and out at every level, for any target (Karras et al. 2022, Table 1, generalised).

    Args:
        target: names the space of a `Constant` weight; the regression is the same for all.
        sigma_data: standard deviation of the data, which must have zero mean.
        c_noise: how the network is told the level.
    """

    target: Target = field(default_factory=X0)
    sigma_data: float = 0.5
    c_noise: NoiseCoordinate = field(default_factory=LogSigma)
    output_space = Space.RESIDUAL

    def __post_init__(self) -> None:
        _check_sigma_data(self.sigma_data)

    def __call__(self, level: NoiseLevel) -> Coefficients:
        sd, (p, q) = self.sigma_data, self.target.row(level)
        V = level.variance(sd)
        return Coefficients(
            c_in=self.c_in(level),
            c_skip=(p * level.alpha * sd**2 + q * level.sigma) / V,
            c_out=-self.target.determinant(level) * sd * V.rsqrt(),
            c_noise=self.c_noise(level),
        )

    def c_in(self, level: NoiseLevel) -> Tensor:
        return level.variance(self.sigma_data).rsqrt()

    def residual(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        sd, scale = self.sigma_data, level.variance(self.sigma_data).rsqrt()
        return (
            per_sample(level.sigma * scale / sd, x0) * x0 - per_sample(level.alpha * sd * scale, x0) * noise
        )

    def to_x0(self, output: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        sd, V = self.sigma_data, level.variance(self.sigma_data)
        return (
            per_sample(level.alpha * sd**2 / V, x_t) * x_t
            + per_sample(level.sigma * sd * V.rsqrt(), x_t) * output
        )

    def check(self, schedule: Schedule) -> None:
        """Every schedule will do."""


@dataclass(frozen=True)
class DDPMPreconditioning(Preconditioning):
    """The network predicts the target itself: c_skip = 0, c_out = 1, c_in = 1 (Ho et al. 2020).

    Args:
        target: what is predicted.
        sigma_data: deviation of the data; it does not enter the training, only weights and curves that state it.
        c_noise: how the network is told the level.
    """

    target: Target = field(default_factory=Epsilon)
    sigma_data: float = 1.0
    c_noise: NoiseCoordinate = field(default_factory=LogSigma)
    output_space = Space.TARGET

    def __post_init__(self) -> None:
        _check_sigma_data(self.sigma_data)

    def __call__(self, level: NoiseLevel) -> Coefficients:
        one = torch.ones_like(level.sigma)
        return Coefficients(c_in=one, c_skip=torch.zeros_like(one), c_out=one, c_noise=self.c_noise(level))

    def c_in(self, level: NoiseLevel) -> Tensor:
        return torch.ones_like(level.sigma)

    def residual(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        return self.target.of(x0, noise, level)

    def to_x0(self, output: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        return self.target.to_x0(output, x_t, level)

    def check(self, schedule: Schedule) -> None:
        if schedule.reaches_zero_snr and bool(self.target.determinant(schedule(torch.ones(1))) == 0):
            raise ValueError(
                f"{self.target} cannot be trained on {schedule}: at its end the data are gone (SNR = 0), and x_0 "
                f"does not follow from {type(self.target).__name__} there. Use the target V, Flow or X0, or "
                "EDMPreconditioning, which takes any target, or a schedule without zero terminal SNR."
            )


def _check_sigma_data(sigma_data: float) -> None:
    if not sigma_data > 0:
        raise ValueError(
            f"Found sigma_data={sigma_data}; expected the standard deviation of the data, above 0."
        )
