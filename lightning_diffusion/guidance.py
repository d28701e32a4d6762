r"""Guidance moves a denoiser away from a lesser one; its arithmetic is float32.

x_0 = g + scale (c - g)        c the denoiser, g what it is moved away from, scale 1 is off

interval   levels sigma/alpha in (low, high] are guided, all others are c alone (Kynkaanniemi et al. 2024, eq. 5)
rescale    share phi of x_0 std(c) / std(x_0), deviations per sample (Lin et al. 2024, eq. 15 and 16)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_diffusion.noise_level import NoiseLevel, per_sample
from lightning_diffusion.objective import Condition, at_least_float32
from lightning_diffusion.sampling import Denoiser


class Guidance(ABC):
    """Makes one denoiser of two."""

    @abstractmethod
    def __call__(self, conditional: Denoiser, unconditional: Denoiser) -> Denoiser:
        """The guided denoiser, from the model's and from what it is moved away from."""

    def guide_for(self, model: Any, condition: Condition) -> Denoiser | None:
        """What to move away from in place of `model` without its condition; None for just that."""
        return None

    @property
    def tag(self) -> str:
        """A few letters for names in logs."""
        return type(self).__name__.lower()


class Extrapolation(NamedTuple):
    """x_0 = g + scale (c - g), as the module says.

    Raises:
        ValueError: in `checked`, unless 0 <= low < high and 0 <= rescale <= 1.
    """

    scale: float
    interval: tuple[float, float] | None
    rescale: float

    def checked(self) -> Extrapolation:
        """Itself, if it can be."""
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                f"Found interval={tuple(self.interval)}; expected 0 <= low < high, levels sigma/alpha such as (0.3, 3)."
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"Found rescale={self.rescale}; expected a share between 0 and 1, such as 0.7.")
        return self

    def __call__(self, c: Denoiser, g: Denoiser) -> Denoiser:
        """The guided denoiser; g is not called where it has no say."""
        return c if self.scale == 1 else lambda x_t, level: self._guided(c, g, x_t, level)

    @property
    def tag(self) -> str:
        """As 2_0.3to3_rescale0.7."""
        interval = "" if self.interval is None else "_{:g}to{:g}".format(*self.interval)
        return f"{self.scale:g}{interval}{f'_rescale{self.rescale:g}' if self.rescale else ''}"

    def _guided(self, c: Denoiser, g: Denoiser, x_t: Tensor, level: NoiseLevel) -> Tensor:
        near, inside = at_least_float32(c(x_t, level)), self._inside(level)
        if inside is not None and not bool(inside.any()):
            return near
        far = at_least_float32(g(x_t, level))
        x0 = self._rescaled(far + self.scale * (near - far), near)
        return x0 if inside is None else torch.where(per_sample(inside, x0), x0, near)

    def _inside(self, level: NoiseLevel) -> Tensor | None:
        if self.interval is None:
            return None
        low, high = self.interval
        return (level.sigma > low * level.alpha) & (level.sigma <= high * level.alpha)

    def _rescaled(self, x0: Tensor, near: Tensor) -> Tensor:
        if self.rescale == 0:
            return x0
        tiny = torch.finfo(x0.dtype).tiny
        factor = near.flatten(1).std(1) / x0.flatten(1).std(1).clamp(min=tiny)
        return x0 * per_sample(1 + self.rescale * (factor - 1), x0)


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """x_0 = u + scale (c - u), u without the condition (Ho & Salimans 2022); their w is scale - 1.

    Args:
        scale: above 1 for samples more typical of their class; 1 is off.
        interval: levels sigma/alpha in (low, high] are guided; None for all. At high noise guidance costs variety, at
            low noise it does nothing but cost time (Kynkaanniemi et al. 2024: (0.28, 2.9] at 64 x 64 latents).
        rescale: share, 0 to 1, by which x_0 gets the deviation back that it has without guidance, against overexposed
            images (Lin et al. 2024: 0.7).

    Raises:
        ValueError: unless 0 <= low < high and 0 <= rescale <= 1.
    """

    scale: float = 1.5
    interval: tuple[float, float] | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        self._extrapolation.checked()

    def __call__(self, conditional: Denoiser, unconditional: Denoiser) -> Denoiser:
        return self._extrapolation(conditional, unconditional)

    @property
    def tag(self) -> str:
        return f"guidance{self._extrapolation.tag}"

    @property
    def _extrapolation(self) -> Extrapolation:
        return Extrapolation(self.scale, self.interval, self.rescale)
