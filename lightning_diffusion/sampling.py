r"""Samplers: from noise to data. They know a denoiser, x_0_hat = denoiser(x_t, level), and nothing else.

Written on the general process x_t = alpha x_0 + sigma eps, whose probability-flow ODE is

    dx = x_0_hat d alpha + eps_hat d sigma          eps_hat = (x_t - alpha x_0_hat) / sigma

One code serves variance-exploding processes (alpha = 1: Karras et al.'s ODE), variance-preserving ones and straight
paths (the velocity eps - x_0), and pure noise (alpha = 0) is a legal start: nothing is divided by alpha.

    noise  N(0, I) of shape (B, ...); its dtype is the sampler's      levels  float64 scalars on the CPU
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.schedules import Schedule

Denoiser = Callable[[Tensor, NoiseLevel], Tensor]


class Guess(NamedTuple):
    """What the denoiser said at a level, shape ()."""

    level: NoiseLevel
    x0: Tensor


class Process(NamedTuple):
    """What a step needs besides x and its levels. `past` is for multistep samplers to remember guesses in."""

    denoise: Denoiser
    schedule: Schedule
    generator: torch.Generator | None
    past: list[Guess]


class Sampler(ABC):
    """sampler(denoiser, noise, schedule) draws samples of the shape of `noise`."""

    num_steps: int

    @abstractmethod
    def step(self, process: Process, x: Tensor, level: NoiseLevel, end: NoiseLevel) -> Tensor:
        """From x at `level` to less noise at `end`; levels are scalars."""

    def __call__(
        self, denoiser: Denoiser, noise: Tensor, schedule: Schedule, generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples of the shape and dtype of `noise`. `generator` drives samplers that add noise on the way."""

        def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
            return denoiser(x, level.expand(len(x)).to(x)).to(x.dtype)

        process = Process(denoise, schedule, generator, [])
        levels = list(_scalars(schedule.sampling_levels(self.num_steps)))
        x = levels[0].sigma * noise
        for level, end in pairwise(levels):
            x = self.step(process, x, level, end)
        return x


@dataclass(frozen=True)
class Euler(Sampler):
    """First order, one evaluation per step; the same as deterministic DDIM."""

    num_steps: int = 50

    def step(self, process: Process, x: Tensor, level: NoiseLevel, end: NoiseLevel) -> Tensor:
        return _recombine(process.denoise(x, level), x, level, end)


@dataclass(frozen=True)
class Churn:
    """Noise added back before a step (Karras et al. 2022, algorithm 2), where sigma/alpha is in the range.

    Args:
        amount: S_churn, spread over all steps.
        sigma_min, sigma_max: S_tmin and S_tmax.
        noise: S_noise, deviation of what is added.
    """

    amount: float = 0.0
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    noise: float = 1.0


@dataclass(frozen=True)
class Heun(Sampler):
    """Second order, two evaluations per step and one for the last (Karras et al. 2022, algorithms 1 and 2).

    Args:
        num_steps: steps; evaluations are 2 num_steps - 1.
        churn: noise added back on the way; none makes the sampler deterministic.
    """

    num_steps: int = 18
    churn: Churn | None = None

    def step(self, process: Process, x: Tensor, level: NoiseLevel, end: NoiseLevel) -> Tensor:
        if self.churn is not None:
            x, level = _churned(process, x, level, self.churn, self.num_steps)
        slope, x0 = _slope_and_x0(process.denoise, x, level)
        guess = end.alpha * x0 + end.sigma * slope
        if end.sigma == 0:
            return guess
        end_slope, end_x0 = _slope_and_x0(process.denoise, guess, end)
        signal, noise = (end.alpha - level.alpha) / 2, (end.sigma - level.sigma) / 2
        return x + signal * (x0 + end_x0) + noise * (slope + end_slope)


@dataclass(frozen=True)
class DPMSolver2M(Sampler):
    """DPM-Solver++(2M), second order at one evaluation per step (Lu et al. 2022, algorithm 2).

    x_0_hat is taken as a line in lambda = ln(alpha/sigma) through this step's guess and the last one's. The first and
    the last step, where lambda is infinite or the past unknown, are of first order.
    """

    num_steps: int = 20

    def step(self, process: Process, x: Tensor, level: NoiseLevel, end: NoiseLevel) -> Tensor:
        guess = Guess(level, process.denoise(x, level))
        x0 = _extrapolated(guess, process.past[-1], end) if process.past else guess.x0
        process.past[:] = [guess]
        return _recombine(x0, x, level, end)


@dataclass(frozen=True)
class DDIM(Sampler):
    """Song et al. 2021, eq. 12: eta = 0 is deterministic, eta = 1 the ancestral sampler."""

    num_steps: int = 50
    eta: float = 0.0

    def step(self, process: Process, x: Tensor, level: NoiseLevel, end: NoiseLevel) -> Tensor:
        x0 = process.denoise(x, level)
        if self.eta == 0:
            return _recombine(x0, x, level, end)
        variance = self.eta**2 * posterior_variance(level, end)
        slope = (x - level.alpha * x0) / level.sigma
        mean = end.alpha * x0 + (end.sigma**2 - variance).clamp(min=0).sqrt() * slope
        return mean + variance.sqrt() * _noise_like(x, process.generator)


@dataclass(frozen=True)
class Ancestral(Sampler):
    """The reverse process drawn step by step (Ho et al. 2020, algorithm 2)."""

    num_steps: int = 250

    def step(self, process: Process, x: Tensor, level: NoiseLevel, end: NoiseLevel) -> Tensor:
        mean = posterior_mean(x, process.denoise(x, level), level, end)
        return mean + posterior_variance(level, end).sqrt() * _noise_like(x, process.generator)


def posterior_mean(x_t: Tensor, x0: Tensor, level: NoiseLevel, end: NoiseLevel) -> Tensor:
    """E[x_s | x_t, x_0] for less noise s (Ho et al. 2020, eq. 7, for any process), shape (B, ...)."""
    ratio = level.alpha / end.alpha
    added = level.sigma**2 - (ratio * end.sigma) ** 2
    return (ratio * end.sigma**2 * x_t + end.alpha * added * x0) / level.sigma**2


def posterior_variance(level: NoiseLevel, end: NoiseLevel) -> Tensor:
    """Var(x_s | x_t, x_0), shape ()."""
    added = level.sigma**2 - (level.alpha / end.alpha * end.sigma) ** 2
    return added.clamp(min=0) * (end.sigma / level.sigma) ** 2


def _scalars(levels: NoiseLevel) -> Iterator[NoiseLevel]:
    return (NoiseLevel(*pair) for pair in zip(*levels, strict=True))


def _slope_and_x0(denoise: Denoiser, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    x0 = denoise(x, level)
    return (x - level.alpha * x0) / level.sigma, x0


def _recombine(x0: Tensor, x: Tensor, level: NoiseLevel, end: NoiseLevel) -> Tensor:
    return end.alpha * x0 + end.sigma * (x - level.alpha * x0) / level.sigma


def _extrapolated(now: Guess, before: Guess, end: NoiseLevel) -> Tensor:
    """D = (1 + 1/(2r)) x_0_i - 1/(2r) x_0_{i-1}, r = h_{i-1}/h_i, h the steps in lambda; eq. 8 on in Lu et al."""
    step, step_before = (
        (b.log_snr - a.log_snr) / 2 for a, b in ((now.level, end), (before.level, now.level))
    )
    half = step / step_before / 2 if step.isfinite() else step.new_zeros(())
    return now.x0 + half * (now.x0 - before.x0)


def _churned(
    process: Process, x: Tensor, level: NoiseLevel, churn: Churn, num_steps: int
) -> tuple[Tensor, NoiseLevel]:
    gamma = min(churn.amount / num_steps, math.sqrt(2) - 1)
    if gamma == 0 or level.alpha == 0 or not churn.sigma_min <= level.sigma / level.alpha <= churn.sigma_max:
        return x, level
    raised = process.schedule.at(level.log_snr - 2 * math.log1p(gamma))
    scale = raised.alpha / level.alpha
    added = (raised.sigma**2 - (scale * level.sigma) ** 2).sqrt()
    return scale * x + added * churn.noise * _noise_like(x, process.generator), raised


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
