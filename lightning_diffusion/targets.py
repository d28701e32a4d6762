r"""What is predicted (knob 3): every target is linear in data and noise.

    y = p x_0 + q eps,   x_t = alpha x_0 + sigma eps,   D = alpha q - sigma p
    x_0 = (q x_t - sigma y) / D,   eps = (alpha y - p x_t) / D

At fixed x_t errors are proportional: |y - y_hat|^2 = (D / sigma)^2 |x_0 - x_0_hat|^2 = (D / alpha)^2 |eps - eps_hat|^2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from lightning_diffusion.noise_level import NoiseLevel, per_sample


class Space(Enum):
    """Whose squared error is meant: see `weightings`."""

    DATA = auto()
    NOISE = auto()
    RATIO = auto()
    RESIDUAL = auto()
    TARGET = auto()


class Target(ABC):
    """A linear target, defined by its row (p, q)."""

    @abstractmethod
    def row(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """(p, q) of y = p x_0 + q eps, each of shape (B,)."""

    def determinant(self, level: NoiseLevel) -> Tensor:
        """D = alpha q - sigma p, shape (B,); zero where x_0 cannot be had from y and x_t."""
        p, q = self.row(level)
        return level.alpha * q - level.sigma * p

    def of(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """y, shape (B, ...)."""
        p, q = self.row(level)
        return per_sample(p, x0) * x0 + per_sample(q, noise) * noise

    def to_x0(self, y: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """x_0 from y and x_t, shape (B, ...)."""
        _, q = self.row(level)
        D = self.determinant(level)
        return per_sample(q / D, x_t) * x_t - per_sample(level.sigma / D, y) * y

    def to_noise(self, y: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """eps from y and x_t, shape (B, ...)."""
        p, _ = self.row(level)
        D = self.determinant(level)
        return per_sample(level.alpha / D, y) * y - per_sample(p / D, x_t) * x_t


@dataclass(frozen=True)
class X0(Target):
    """The clean data."""

    def row(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return torch.ones_like(level.alpha), torch.zeros_like(level.alpha)

    def to_x0(self, y: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        return y


@dataclass(frozen=True)
class Epsilon(Target):
    """The noise (Ho et al. 2020)."""

    def row(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(level.alpha), torch.ones_like(level.alpha)

    def to_noise(self, y: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
        return y


@dataclass(frozen=True)
class V(Target):
    """v = alpha eps - sigma x_0 (Salimans & Ho 2022)."""

    def row(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return -level.sigma, level.alpha


@dataclass(frozen=True)
class Score(Target):
    """The score of x_t given x_0, -eps / sigma (Song et al. 2021); infinite at sigma = 0."""

    def row(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(level.alpha), -1 / level.sigma


@dataclass(frozen=True)
class Flow(Target):
    """The velocity of the straight path, eps - x_0 (Lipman et al. 2023)."""

    def row(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(level.alpha), torch.ones_like(level.alpha)
