"""Guidance wraps denoisers; its arithmetic is float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.sampling import Denoiser


class Guidance(ABC):
    """Makes one denoiser of a conditional and an unconditional one."""

    @abstractmethod
    def __call__(self, conditional: Denoiser, unconditional: Denoiser) -> Denoiser:
        """The guided denoiser."""


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """x_0 = u + scale (c - u) (Ho & Salimans 2022); scale 1 is off, their w is scale - 1.

    Args:
        scale: above 1 for samples more typical of their class.
    """

    scale: float = 1.5

    def __call__(self, conditional: Denoiser, unconditional: Denoiser) -> Denoiser:
        if self.scale == 1:
            return conditional

        def guided(x_t: Tensor, level: NoiseLevel) -> Tensor:
            u = unconditional(x_t, level)
            return u + self.scale * (conditional(x_t, level) - u)

        return guided
