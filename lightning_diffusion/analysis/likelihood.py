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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_diffusion.analysis.decoders import Decoder, DiscreteDecoder, GaussianDecoder
from lightning_diffusion.analysis.information import Estimate
from lightning_diffusion.analysis.measuring import (
    Measured,
    draw_noise,
    generator,
    measured,
    measured_module,
    noise_error,
    peek,
    power,
    surplus,
)
from lightning_diffusion.analysis.moments import Moments, moments
from lightning_diffusion.drawing import evaluating
from lightning_diffusion.resume import RandomKey
from lightning_diffusion.sampling import Denoiser
from lightning_diffusion.schedules import ContinuousCosineSchedule, Schedule

if TYPE_CHECKING:
    from lightning_diffusion.module import DiffusionModule

_Ends = tuple[float, float | None]


class LikelihoodBound(NamedTuple):
    """An upper bound on -log2 p(x_0), mean over samples, and its parts, in bits per dimension; each of shape ()."""

    total: Estimate
    prior: Estimate
    diffusion: Estimate
    decoder: Estimate


@torch.no_grad()
def likelihood_bound(
    denoiser: Denoiser,
    data: Tensor | Iterable[Any],
    decoder: Decoder = GaussianDecoder(),
    *,
    log_snr_range: _Ends = (-10.0, None),
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
        log_snr_range: where the prior takes over and where the decoder does, None where the decoder likes to. The bound
            holds for any range: the least is the best.
        levels: per sample.
        schedule: whose scaling of x_t the denoiser was trained on; see `mmse_curve`.
        seed: of levels and noise.

    Raises:
        ValueError: for a range that does not rise or is infinite, fewer than one level or two samples.
    """
    return _bound(measured(denoiser, data), decoder, log_snr_range, levels, schedule, seed)


@torch.no_grad()
def module_likelihood_bound(
    module: DiffusionModule,
    batches: Iterable[Any],
    decoder: Decoder = DiscreteDecoder(),
    *,
    log_snr_range: _Ends = (-10.0, None),
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
    stream, schedule = measured_module(module, batches, weights, seed), module.objective.schedule
    with evaluating(module.network):
        return _bound(stream, decoder, log_snr_range, levels, schedule, seed)


def prior_offset(log_snr: float, dimensions: int) -> float:
    """The part D/2 (sigma^2 - 1 - ln sigma^2) of the prior term that no data enter, in nats."""
    alpha2 = 1 / (1 + math.exp(-log_snr))
    return dimensions / 2 * (math.log1p(math.exp(log_snr)) - alpha2)


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
    stream: Iterable[Measured], decoder: Decoder, ends: _Ends, levels: int, schedule: Schedule, seed: int
) -> LikelihoodBound:
    first, stream = peek(stream)
    span, d = (
        _Span(ends[0], decoder.last_log_snr(first) if ends[1] is None else ends[1], levels),
        first.x0[0].numel(),
    )
    terms = (_terms(batch, i, decoder, span, schedule, seed) for i, batch in enumerate(stream))
    found = moments(terms)
    if not bool(found.mean.isfinite().all()):
        raise ValueError(
            f"Found prior, diffusion and decoder terms {found.mean[:3].tolist()} in nats; expected finite ones: a "
            f"denoiser that is finite at log-SNR {span.low:g} to {span.high:g}. `mmse_curve` says where it is not."
        )
    found = found.controlled(2)
    offset = torch.tensor([prior_offset(span.low, d), 0.0, 0.0], dtype=torch.float64)
    return bound_of(found._replace(mean=found.mean + offset), d)


def _terms(
    batch: Measured, number: int, decoder: Decoder, span: _Span, schedule: Schedule, seed: int
) -> Tensor:
    """The three terms but for the prior's constant, then a control of each of the last two, in nats, shape (B, 5)."""
    source, key = generator(seed, number), RandomKey(seed, batch=number)
    low, high = torch.tensor([span.low, span.high], dtype=torch.float64)
    diffusion, control = torch.zeros(2, len(batch.x0), dtype=torch.float64)
    for log_snr in span.draw(len(batch.x0), key):
        noise = draw_noise(batch.x0, source)
        diffusion = diffusion + noise_error(batch, noise, schedule.at(log_snr))
        control = control + log_snr.sigmoid() ** 2 * surplus(noise)
    noise = draw_noise(batch.x0, source)
    decoded = decoder(batch, noise, schedule.at(high[None]))
    prior = low.sigmoid() / 2 * power(batch.x0)
    return torch.stack([prior, span.step / 2 * diffusion, decoded, control, surplus(noise)], 1)
