r"""How much to learn (knob 2): a weight on the squared error at each noise level.

A weight states the space of the error that it multiplies:

    DATA      |x_0 - x_0_hat|^2        NOISE     |eps - eps_hat|^2
    RATIO     |x_0 - x_0_hat|^2 / sigma^2 = |eps - eps_hat|^2 / alpha^2
    RESIDUAL  the error of the unit-variance residual of full preconditioning
    TARGET    the error of whatever the network is trained to predict

The objective carries it to the network's output by one conversion, (D_space / D_output)^2 (see `targets`). Weights
on SNR are written in RATIO, where they are finite at alpha = 0 and sigma = 0: sigma^2 w(SNR) for a w stated on data.
The papers assume data of deviation 1; for others SNR means sigma_data^2 alpha^2 / sigma^2 here, so that scaling
the data changes nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.recording import Recorded
from lightning_diffusion.targets import Space


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

    def combine(self, loss: Tensor, c_noise: Tensor) -> Tensor:
        """What is minimised, from the weighted loss of each sample, both of shape (B,)."""
        return loss


@dataclass(frozen=True)
class Constant(Weighting):
    """w = 1 on the training target: DDPM's simple loss when that is the noise (Ho et al. 2020, eq. 14)."""

    space = Space.TARGET

    def __call__(self, level: NoiseLevel, setting: Setting) -> Tensor:
        return torch.ones_like(level.sigma)


@dataclass(frozen=True)
class EDMWeighting(Weighting):
    """w = SNR + 1 / sigma_data^2 on x_0, which is 1 on the residual (Karras et al. 2022, Table 1).

    Args:
        scale: a factor on all levels alike.
    """

    scale: float = 1.0
    space = Space.RESIDUAL

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"Found {self}; expected scale > 0.")

    def __call__(self, level: NoiseLevel, setting: Setting) -> Tensor:
        return torch.full_like(level.sigma, self.scale)


class SNRWeighting(Weighting):
    """A weight that is a function of SNR = signal / noise, for data of deviation 1."""

    space = Space.RATIO

    @abstractmethod
    def on(self, signal: Tensor, noise: Tensor) -> Tensor:
        """noise * w(signal / noise) for a w on data, with signal = alpha^2 and noise = sigma^2, shape (B,)."""

    def __call__(self, level: NoiseLevel, setting: Setting) -> Tensor:
        variance = setting.sigma_data**2
        return self.on(variance * level.alpha**2, level.sigma**2) / variance


@dataclass(frozen=True)
class P2(SNRWeighting):
    """w = 1 / (k + SNR)^gamma on epsilon (Choi et al. 2022, eq. 8)."""

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        _check_at_least_zero(self, self.gamma, self.k)

    def on(self, signal: Tensor, noise: Tensor) -> Tensor:
        return signal * (noise / (self.k * noise + signal)) ** self.gamma


@dataclass(frozen=True)
class SNRPower(SNRWeighting):
    """w = SNR^gamma on x_0; gamma = 1 is 1 on epsilon (Ho et al. 2020), 0 is 1 on x_0."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_at_least_zero(self, self.gamma)

    def on(self, signal: Tensor, noise: Tensor) -> Tensor:
        return signal**self.gamma * noise ** (1 - self.gamma)


@dataclass(frozen=True)
class MinSNR(SNRWeighting):
    """w = min(SNR, gamma) on x_0 (Hang et al. 2023, sec. 3.4)."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_at_least_zero(self, self.gamma)

    def on(self, signal: Tensor, noise: Tensor) -> Tensor:
        return torch.minimum(signal, self.gamma * noise)


@dataclass(frozen=True)
class MaxSNR(SNRWeighting):
    """w = max(SNR, gamma) on x_0, "truncated SNR" (Salimans & Ho 2022, sec. 4)."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_at_least_zero(self, self.gamma)

    def on(self, signal: Tensor, noise: Tensor) -> Tensor:
        return torch.maximum(signal, self.gamma * noise)


@dataclass(frozen=True)
class SNRClip(SNRWeighting):
    """w = SNR held within [low, high] on x_0."""

    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        _check_at_least_zero(self, self.low, self.high - self.low)

    def on(self, signal: Tensor, noise: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(signal, self.low * noise), self.high * noise)


@dataclass(frozen=True)
class LogSNR(SNRWeighting):
    """w = ln(1 + SNR) on x_0; plain ln SNR would be negative below SNR = 1."""

    def on(self, signal: Tensor, noise: Tensor) -> Tensor:
        weight: Tensor = torch.special.xlog1py(noise, signal / noise)
        return weight


@dataclass(frozen=True)
class SoftMinSNR(SNRWeighting):
    """w = 1 / (1 / SNR + 1 / gamma) on x_0 (Crowson et al. 2024, who take gamma = 1 / sigma_data^2, SNR unscaled)."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"Found {self}; expected gamma > 0.")

    def on(self, signal: Tensor, noise: Tensor) -> Tensor:
        return signal * noise / (noise + signal / self.gamma)


@dataclass(frozen=True)
class Debiased(SNRWeighting):
    """w = 1 / sqrt(min(SNR, limit)) on epsilon (Yu et al. 2023; the limit is that of trainers in use)."""

    limit: float = 1000.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"Found {self}; expected limit > 0.")

    def on(self, signal: Tensor, noise: Tensor) -> Tensor:
        return torch.maximum((signal * noise).sqrt(), signal / self.limit**0.5)


@dataclass(frozen=True)
class Sigmoid(Weighting):
    """w = sigmoid(bias - log_snr) per unit of log-SNR on epsilon (Kingma & Gao 2023; Hoogeboom et al. 2024).

    What counts is the weight times the density of training: it is divided by that density here.

    Args:
        bias: in use from -3 to 2; log-SNR is that of data of deviation 1.
    """

    bias: float = 0.0
    space = Space.NOISE

    def __call__(self, level: NoiseLevel, setting: Setting) -> Tensor:
        log_snr = level.log_snr
        log_weight = logsigmoid(self.bias - log_snr - 2 * math.log(setting.sigma_data))
        log_prob = setting.log_prob(log_snr)
        weight = (log_weight - log_prob).exp()
        return weight.where((level.alpha > 0) & (level.sigma > 0) & (log_prob > -math.inf), 0.0)


class Uncertainty(Recorded, nn.Module, Weighting):
    """loss / exp(u) + u with u learned from the noise level (Karras et al. 2024, "EDM2", eq. 21 on).

    Every level then has the same share in the gradient, whatever its loss: u tends to ln E[loss]. Trained with the
    network, its weights put back to unit norm before each step (eq. 66), saved with it, never averaged.

    Args:
        features: random Fourier features of c_noise.
    """

    space = Space.RESIDUAL
    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # the same in every run and on every rank
        self.register_buffer("frequencies", torch.randn(features, generator=generator))
        self.register_buffer("phases", torch.rand(features, generator=generator))
        self.weight = nn.Parameter(torch.randn(features, generator=generator))

    def __call__(self, level: NoiseLevel, setting: Setting) -> Tensor:
        return torch.ones_like(level.sigma)

    def log_loss(self, c_noise: Tensor) -> Tensor:
        """u, shape (B,), float32: a unit-norm combination of sqrt(2) cos(2 pi (f c_noise + phi))."""
        turns = c_noise.float()[:, None] * self.frequencies.float() + self.phases.float()
        features = math.sqrt(2) * (2 * math.pi * turns).cos()
        log_loss: Tensor = features @ self._unit_weight() / math.sqrt(len(self.weight))
        return log_loss

    def _unit_weight(self) -> Tensor:
        """Of root mean square 1."""
        weight = self.weight.float()
        rms: Tensor = torch.linalg.vector_norm(weight) / math.sqrt(len(weight))
        return weight / (1e-4 + rms)

    def combine(self, loss: Tensor, c_noise: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and self.weight.requires_grad:
            with torch.no_grad():
                self.weight.copy_(self._unit_weight())
        with torch.autocast(loss.device.type, enabled=False):
            u = self.log_loss(c_noise)
        return loss / u.exp() + u


def _check_at_least_zero(weighting: Weighting, *values: float) -> None:
    if min(values) < 0:
        raise ValueError(f"Found {weighting}; expected numbers of at least 0, in rising order.")
