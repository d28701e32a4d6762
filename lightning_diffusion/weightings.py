r"""How much to learn (knob 2): a weight on the squared error at each noise level.

A weight states the space of the error that it multiplies:

    DATA      |x_0 - x_0_hat|^2        NOISE     |eps - eps_hat|^2
    RESIDUAL  the error of the unit-variance residual of full preconditioning
    TARGET    the error of whatever the network is trained to predict

The objective carries it to the network's output by one conversion, (D_space / D_output)^2 (see `targets`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_diffusion.noise_level import NoiseLevel


class Space(Enum):
    """Whose squared error a weight multiplies."""

    DATA = auto()
    NOISE = auto()
    RESIDUAL = auto()
    TARGET = auto()


class Setting(NamedTuple):
    """What a weight may depend on besides the level.

    sigma_data: deviation of the data. log_prob: log-density of training's log-SNRs, (B,) to (B,).
    """

    sigma_data: float
    log_prob: Callable[[Tensor], Tensor]


class Weighting(ABC):
    """A non-negative weight w(level), stated in `space`."""

    space: ClassVar[Space]

    @abstractmethod
    def __call__(self, level: NoiseLevel, setting: Setting) -> Tensor:
        """w, shape (B,)."""


@dataclass(frozen=True)
class Constant(Weighting):
    """w = 1 on the training target: DDPM's simple loss when that is the noise (Ho et al. 2020, eq. 14)."""

    space = Space.TARGET

    def __call__(self, level: NoiseLevel, setting: Setting) -> Tensor:
        return torch.ones_like(level.sigma)


@dataclass(frozen=True)
class EDMWeighting(Weighting):
    """w = SNR + 1 / sigma_data^2 on x_0, which is 1 on the residual (Karras et al. 2022, Table 1)."""

    space = Space.RESIDUAL

    def __call__(self, level: NoiseLevel, setting: Setting) -> Tensor:
        return torch.ones_like(level.sigma)
