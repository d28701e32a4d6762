r"""Profiles of running averages: E <- beta E + (1 - beta) theta, beta = profile.beta(t, dt).

    t    the clock after the step, in optimizer steps or images
    dt   the step's length on the same clock; dt = 0 is a step that was not taken, beta is then 1

Formulas hold for floats and tensors: whether a gradient scaler skipped a step is known on the device only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor

Clock = Literal["steps", "images"]
Scalar = float | Tensor

WIDEST_SIGMA_REL = 12**-0.5


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Exponent of the power-function profile whose deviation is `sigma_rel` of the run's length.

    Largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2), Karras et al. 2024, eq. 126.

    >>> round(gamma_from_sigma_rel(0.10), 4)
    6.9372
    """
    if not 0 < sigma_rel < WIDEST_SIGMA_REL:
        raise ValueError(
            f"sigma_rel={sigma_rel!r} is not a width of a power-function average: write a number between 0 "
            f"and {WIDEST_SIGMA_REL:.4f} (a uniform average of the whole run), such as 0.10."
        )
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots.real.max())


def power_function_beta(sigma_rel: float, t: float, dt: float) -> float:
    """Share of a power-function average that survives from t - dt to t: (1 - dt/t)^(gamma + 1)."""
    return float((1 - dt / t) ** (gamma_from_sigma_rel(sigma_rel) + 1))


def _at_most(x: Scalar, limit: float) -> Scalar:
    return x.clamp(max=limit) if isinstance(x, Tensor) else min(x, limit)


def _at_least(x: Scalar, limit: float) -> Scalar:
    return x.clamp(min=limit) if isinstance(x, Tensor) else max(x, limit)


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(
            f"decay={decay!r}: the share of itself an average keeps is in [0, 1); write 0.999, say."
        )


class Profile(ABC):
    """How an average weighs the weights of the past."""

    clock: Clock = "steps"

    @abstractmethod
    def beta(self, t: Scalar, dt: Scalar) -> Scalar:
        """Share of the average that survives the step from t - dt to t; 1 at dt = 0."""


@dataclass(frozen=True)
class FixedDecay(Profile):
    """beta = decay: weights k steps old count decay^k; starts from the initial weights."""

    decay: float = 0.999

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def beta(self, t: Scalar, dt: Scalar) -> Scalar:
        return self.decay**dt


@dataclass(frozen=True)
class PowerFunction(Profile):
    """beta = (1 - dt/t)^(gamma + 1): as wide as `sigma_rel` of the training so far (Karras et al. 2024)."""

    sigma_rel: float = 0.10
    clock: Clock = "steps"

    def __post_init__(self) -> None:
        gamma_from_sigma_rel(self.sigma_rel)

    @cached_property
    def exponent(self) -> float:
        """A = gamma + 1."""
        return gamma_from_sigma_rel(self.sigma_rel) + 1

    def beta(self, t: Scalar, dt: Scalar) -> Scalar:
        return (1 - dt / t) ** self.exponent


@dataclass(frozen=True)
class InverseGamma(Profile):
    """beta = min(decay, 1 - (1 + n/inv_gamma)^-power) after n steps: a warm-up (K. Crowson)."""

    decay: float = 0.9999
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def __post_init__(self) -> None:
        _check_decay(self.decay)
        if not (self.inv_gamma > 0 and self.power > 0):
            raise ValueError(f"{self!r}: inv_gamma and power must be positive; write 1.0 and 2/3.")

    def beta(self, t: Scalar, dt: Scalar) -> Scalar:
        return _at_most(1 - (1 + (t - 1) / self.inv_gamma) ** -self.power, self.decay) ** dt


@dataclass(frozen=True)
class RatioWarmup(Profile):
    """beta = min(decay, (1 + n)/(10 + n)) after n steps: the warm-up of TensorFlow and diffusers."""

    decay: float = 0.9999

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def beta(self, t: Scalar, dt: Scalar) -> Scalar:
        return _at_most(t / (t + 9), self.decay) ** dt


@dataclass(frozen=True)
class HalfLife(Profile):
    """beta = 0.5^(batch/h), h = min(images, rampup * images so far): EDM's (Karras et al. 2022)."""

    images: float = 500_000
    rampup: float = 0.05
    clock: Clock = field(default="images", init=False, repr=False)

    def __post_init__(self) -> None:
        if not (self.images > 0 and self.rampup > 0):
            raise ValueError(f"{self!r}: both must be positive; write rampup=inf for no ramp.")

    def beta(self, t: Scalar, dt: Scalar) -> Scalar:
        halflife = _at_most(self.rampup * _at_least(t - dt, 1e-8), self.images)
        return 0.5 ** (dt / halflife)


def profiles_by_name(decay: float | Profile | Mapping[str, Profile]) -> dict[str, Profile]:
    """Profiles of averages by name: a decay or a single profile is `ema`."""
    if isinstance(decay, Mapping):
        return dict(decay)
    return {"ema": decay if isinstance(decay, Profile) else FixedDecay(decay)}
