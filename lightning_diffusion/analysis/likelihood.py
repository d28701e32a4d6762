r"""A bound on the likelihood that a denoiser gives to data (Kingma et al. 2021, eq. 11 to 14), D dimensions, in nats:

    -ln p(x_0) <= prior + diffusion + decoder
    prior      KL(q(x_t | x_0) | N(0, I)) = 1/2 (alpha^2 |x_0|^2 + D (sigma^2 - 1 - ln sigma^2)), at the least log-SNR
    diffusion  1/2 integral of |eps - eps_hat|^2 over log-SNR
    decoder    E[-ln p(x_0 | x_t)] at the greatest log-SNR

It holds for any denoiser, any range of log-SNR and any scaling of x_t (the prior is variance preserving, which loses
nothing). Bits per dimension are nats / (D ln 2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_diffusion.analysis.information import Estimate
from lightning_diffusion.analysis.measuring import (
    Measured,
    Units,
    dimensions_of,
    draw_noise,
    generator,
    measured,
    measured_module,
    noise_error,
    power,
)
from lightning_diffusion.analysis.moments import Moments, moments
from lightning_diffusion.drawing import evaluating
from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.resume import RandomKey
from lightning_diffusion.sampling import Denoiser
from lightning_diffusion.schedules import ContinuousCosineSchedule, Schedule

if TYPE_CHECKING:
    from lightning_diffusion.module import DiffusionModule

_REACH = 10.0  # standard deviations of x_t beyond which a discrete value is out of the question, e^-50


class LikelihoodBound(NamedTuple):
    """An upper bound on -log2 p(x_0), mean over samples, and its parts, in bits per dimension; each of shape ()."""

    total: Estimate
    prior: Estimate
    diffusion: Estimate
    decoder: Estimate


class Decoder(ABC):
    """p(x_0 | x_t) at the last, least noisy level."""

    @abstractmethod
    def __call__(self, batch: Measured, noise: Tensor, level: NoiseLevel) -> Tensor:
        """-ln p(x_0 | x_t) for x_t = alpha x_0 + sigma noise at one level (1,), float64 on the CPU, shape (B,)."""


@dataclass(frozen=True)
class GaussianDecoder(Decoder):
    """N(x_0; x_0_hat, I / SNR): for data with a density.

    Args:
        bin_width: 1 for the density itself; the width of a bin, 2/255 for 8-bit images in [-1, 1], for density times
            width, which compares with discrete data (log2(255/2) = 6.994 bits more).
    """

    bin_width: float = 1.0

    def __post_init__(self) -> None:
        if not self.bin_width > 0:
            raise ValueError(f"Found {self}; expected bin_width > 0, such as 1 or 2/255.")

    def __call__(self, batch: Measured, noise: Tensor, level: NoiseLevel) -> Tensor:
        width = (_known(batch).scale.double() * self.bin_width).expand(batch.x0.shape[1:])
        error = noise_error(batch, noise, level.expand(len(noise)))
        return error / 2 + gaussian_offset(level.log_snr.item(), noise[0].numel()) - width.log().sum().cpu()


@dataclass(frozen=True)
class DiscreteDecoder(Decoder):
    """softmax over k of -(x_t - alpha x_k)^2 / (2 sigma^2), in every dimension: for data on a grid of values.

    Args:
        num_values, low, high: x_k, evenly spaced from low to high; by default 8-bit images in [-1, 1].

    Raises:
        ValueError: for fewer than two values, or data that are not on the grid.
    """

    num_values: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.num_values < 2 or not self.low < self.high:
            raise ValueError(f"Found {self}; expected at least two values and low < high.")

    def __call__(self, batch: Measured, noise: Tensor, level: NoiseLevel) -> Tensor:
        own, step = self._place(batch)
        sigma = (level.sigma / level.alpha).double().to(noise.device) / step  # in steps of the grid
        at = sigma * noise.double()
        reach = min(self.num_values - 1, math.ceil((at.abs().max() + _REACH * sigma.max()).item()))
        total = torch.zeros_like(at)
        for other in (j for j in range(-reach, reach + 1) if j):
            logit = (2 * at * other - other**2) / (2 * sigma**2)
            there = (own + other >= 0) & (own + other < self.num_values)
            total = torch.logaddexp(total, logit.where(there, -math.inf))
        return total.flatten(1).sum(1).cpu()

    def _place(self, batch: Measured) -> tuple[Tensor, Tensor]:
        """The number of each element's value, shape of x_0, and the grid's step in x_0's units."""
        scale, shift = _known(batch)
        step = scale.double() * ((self.high - self.low) / (self.num_values - 1))
        place = (batch.x0.double() - (scale.double() * self.low + shift)) / step
        own = place.round().clamp(0, self.num_values - 1)
        off = (place - own).abs().max().item()
        if off > 0.05:
            raise ValueError(
                f"Found data {off:.3g} steps off the {self.num_values} values from {self.low:g} to {self.high:g}; "
                "expected data on them: give num_values, low and high of the data, or use GaussianDecoder."
            )
        return own, step


@torch.no_grad()
def likelihood_bound(
    denoiser: Denoiser,
    data: Tensor | Iterable[Any],
    decoder: Decoder = GaussianDecoder(),
    *,
    log_snr_range: tuple[float, float] = (-10.0, 14.0),
    levels: int = 16,
    schedule: Schedule = ContinuousCosineSchedule(),
    seed: int = 0,
) -> LikelihoodBound:
    """Bits per dimension of data under a denoiser, at most, with standard errors over the samples.

    Each sample is seen at `levels` evenly spaced levels, moved by a random offset that is stratified over the batch:
    unbiased for any number of levels, N (levels + 1) evaluations.

    Args:
        denoiser: x_0_hat = denoiser(x_t, level), such as `partial(objective.denoise, network)`; of a module with labels
            or a representation use `module_likelihood_bound`.
        data: x_0, a tensor (N, ...) or batches of it, on the denoiser's device.
        decoder: p(x_0 | x_t) at the last level; it says whether a density or probabilities are meant.
        log_snr_range: where the prior takes over and where the decoder does. Any will do: the least bound is the best.
        levels: per sample.
        schedule: whose scaling of x_t the denoiser was trained on; see `mmse_curve`.
        seed: of levels and noise.

    Raises:
        ValueError: for a range that does not rise or is infinite, fewer than one level or two samples.
    """
    span = _Span(*log_snr_range, levels)
    return _bound(measured(denoiser, data), decoder, span, schedule, seed)


@torch.no_grad()
def module_likelihood_bound(
    module: DiffusionModule,
    batches: Iterable[Any],
    decoder: Decoder = DiscreteDecoder(),
    *,
    log_snr_range: tuple[float, float] = (-10.0, 14.0),
    levels: int = 16,
    weights: str = "online",
    seed: int = 0,
) -> LikelihoodBound:
    """`likelihood_bound` of the images that a loader yields, under their labels, with a trained module.

    Args:
        module: on any device; the representation's scale is taken into account.
        batches: images (B, C, H, W) in [-1, 1], (images, labels) or {"image": ..., "label": ...}.
        decoder, log_snr_range, levels, seed: as in `likelihood_bound`; values and widths are those of the images.
        weights: online, ema, ema:NAME or FILE.safetensors.

    Raises:
        ValueError: also for a representation that mixes pixels.
    """
    span, stream = _Span(*log_snr_range, levels), measured_module(module, batches, weights)
    with evaluating(module.network):
        return _bound(stream, decoder, span, module.objective.schedule, seed)


def prior_offset(log_snr: float, dimensions: int) -> float:
    """The part D/2 (sigma^2 - 1 - ln sigma^2) of the prior term that no data enter, in nats."""
    alpha2 = 1 / (1 + math.exp(-log_snr))
    return dimensions / 2 * (math.log1p(math.exp(log_snr)) - alpha2)


def gaussian_offset(log_snr: float, dimensions: int) -> float:
    """D/2 ln(2 pi / SNR), in nats."""
    return dimensions / 2 * (math.log(2 * math.pi) - log_snr)


def bound_of(terms: Moments, dimensions: int) -> LikelihoodBound:
    """From the three terms in nats, shape (3,)."""
    bits = terms.linear(torch.eye(3, dtype=torch.float64) / (dimensions * math.log(2)))
    total = bits.linear(torch.ones(1, 3, dtype=torch.float64)).estimate
    return LikelihoodBound(
        *(Estimate(part.value[i], part.standard_error[i]) for part, i in _parts(total, bits))
    )


def _parts(total: Estimate, bits: Moments) -> list[tuple[Estimate, int]]:
    return [(total, 0), *((bits.estimate, i) for i in range(3))]


@dataclass(frozen=True)
class _Span:
    low: float
    high: float
    levels: int

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf or self.levels < 1:
            raise ValueError(
                f"Found log_snr_range=({self.low}, {self.high}) and levels={self.levels}; expected finite log-SNRs, "
                "the lower first, and at least one level."
            )

    @property
    def step(self) -> float:
        return (self.high - self.low) / self.levels

    def draw(self, batch: int, key: RandomKey) -> Iterator[Tensor]:
        """Log-SNRs (batch,), `levels` times."""
        offset = key.stratified_uniform("measured level", batch)
        return (self.low + self.step * (level + offset) for level in range(self.levels))


def _bound(
    stream: Iterable[Measured], decoder: Decoder, span: _Span, schedule: Schedule, seed: int
) -> LikelihoodBound:
    dimensions, stream = dimensions_of(stream)
    found = moments(_terms(batch, i, decoder, span, schedule, seed) for i, batch in enumerate(stream))
    if not bool(found.mean.isfinite().all()):
        raise ValueError(
            f"Found prior, diffusion and decoder terms {found.mean.tolist()} in nats; expected finite ones: a denoiser "
            f"that is finite at log-SNR {span.low:g} to {span.high:g}. `mmse_curve` says where it is not."
        )
    offset = torch.tensor([prior_offset(span.low, dimensions), 0.0, 0.0], dtype=torch.float64)
    return bound_of(Moments(found.mean + offset, found.covariance), dimensions)


def _terms(
    batch: Measured, number: int, decoder: Decoder, span: _Span, schedule: Schedule, seed: int
) -> Tensor:
    """The three terms but for the prior's constant, in nats, shape (B, 3)."""
    source, key = generator(seed, number), RandomKey(seed, batch=number)
    low, high = torch.tensor([span.low, span.high], dtype=torch.float64)
    errors = [
        noise_error(batch, draw_noise(batch.x0, source), schedule.at(log_snr))
        for log_snr in span.draw(len(batch.x0), key)
    ]
    prior = low.sigmoid() / 2 * power(batch.x0)
    decoded = decoder(batch, draw_noise(batch.x0, source), schedule.at(high[None]))
    return torch.stack([prior, span.step / 2 * torch.stack(errors).sum(0), decoded], 1)


def _known(batch: Measured) -> Units:
    if batch.units is None:
        raise ValueError(
            "Found a representation that does more than scale and shift each element of an image; expected one such as "
            "Identity or Standardize. For bits per latent dimension, encode the data and call likelihood_bound("
            "module.denoiser(), encoded)."
        )
    return batch.units
