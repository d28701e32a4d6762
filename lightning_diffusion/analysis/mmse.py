r"""How much noise a denoiser leaves at each noise level, and what that says about information.

    e(log_snr) = E|eps - eps_hat|^2 = SNR E|x_0 - x_0_hat|^2         sums over the D dimensions, shape (L,)
    I(x_0; x_t) = 1/2 integral of e over log-SNR up to x_t's         I-MMSE (Guo et al. 2005), nats per sample

With the best denoiser these are the MMSE and the information; any other's lie above. The likelihood bound is that of
Kingma et al. 2021 (variational diffusion models), see `likelihood`, with the Gaussian decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from lightning_diffusion.analysis.decoders import gaussian_offset
from lightning_diffusion.analysis.information import Estimate, GaussianMixture
from lightning_diffusion.analysis.likelihood import LikelihoodBound, bound_of, prior_offset
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
from lightning_diffusion.sampling import Denoiser
from lightning_diffusion.schedules import ContinuousCosineSchedule, Schedule

if TYPE_CHECKING:
    from lightning_diffusion.module import DiffusionModule

_NEIGHBOURS = 6  # levels through which a polynomial is laid in each interval
_POINTS = 16  # of Gauss and Legendre, in each interval


class MMSECurve(NamedTuple):
    """Errors of a denoiser over log-SNR, float64.

    Attributes:
        log_snr: rising, shape (L,).
        moments: of |x_0|^2 and then of |eps - eps_hat|^2 at each level, shape (1 + L,); the same samples and noise at
            all levels, hence their covariance.
        dimensions: D.
    """

    log_snr: Tensor
    moments: Moments
    dimensions: int

    @property
    def epsilon(self) -> Estimate:
        """E|eps - eps_hat|^2, summed over dimensions, shape (L,); from 0 at pure noise to D where x_0 has a density."""
        return Estimate(*(part[1:] for part in self.moments.estimate))

    @property
    def x0(self) -> Estimate:
        """E|x_0 - x_0_hat|^2, summed over dimensions, shape (L,)."""
        return Estimate(*(part / self.log_snr.exp() for part in self.epsilon))

    @property
    def mutual_information(self) -> Estimate:
        """I(x_0; x_t) in nats per sample, shape (L,); of a denoiser that is not the best an upper estimate.

        Piecewise polynomials through the levels. Below the first level x_0_hat is taken not to change any more: e falls
        with SNR, which is right as soon as SNR E|x_0|^2 / D is small there (log-SNR -10, say).
        """
        return self.moments.linear(pad(_integrals(self.log_snr) / 2, (1, 0))).estimate

    def likelihood_bound(self, bin_width: float = 1.0) -> LikelihoodBound:
        """Of -log2 p(x_0) in bits per dimension, from the first level to the last, with a Gaussian decoder.

        Args:
            bin_width: 1 for the density itself; 2/255, say, for the probability of a bin of that width.
        """
        d, low, high = self.dimensions, self.log_snr[0].item(), self.log_snr[-1].item()
        terms = torch.zeros(3, 1 + len(self.log_snr), dtype=torch.float64)
        terms[0, 0] = self.log_snr[0].sigmoid() / 2
        integrals = _integrals(self.log_snr) / 2
        terms[1, 1:] = integrals[-1] - integrals[0]
        terms[2, -1] = 0.5
        offset = (prior_offset(low, d), 0.0, gaussian_offset(high, d) - d * math.log(bin_width))
        return bound_of(self.moments.linear(terms, torch.tensor(offset, dtype=torch.float64)), d)


@torch.no_grad()
def mmse_curve(
    denoiser: Denoiser,
    data: Tensor | Iterable[Any],
    log_snr: Tensor,
    *,
    schedule: Schedule = ContinuousCosineSchedule(),
    seed: int = 0,
) -> MMSECurve:
    """The errors of a denoiser on data, with standard errors over the samples.

    Every sample is seen at every level, with the same noise: N L evaluations, smooth curves, and the exact standard
    error of any integral over levels. Memory does not grow with N.

    Args:
        denoiser: x_0_hat = denoiser(x_t, level), such as `partial(objective.denoise, network)`; of a module with labels
            or a representation use `module_mmse_curve`.
        data: x_0, a tensor (N, ...) or batches of it, on the denoiser's device.
        log_snr: levels, rising and finite, shape (L,).
        schedule: whose scaling of x_t the denoiser was trained on; variance preserving by default, and all the same
            to `EDMPreconditioning`.
        seed: of the noise, which is drawn on the CPU.

    Raises:
        ValueError: for levels that do not rise or are infinite, for fewer than two samples, for errors that are NaN.
    """
    return _curve(measured(denoiser, data), log_snr, schedule, seed)


@torch.no_grad()
def module_mmse_curve(
    module: DiffusionModule,
    batches: Iterable[Any],
    log_snr: Tensor,
    *,
    weights: str = "online",
    seed: int = 0,
) -> MMSECurve:
    """`mmse_curve` of a trained module on what a loader yields, under the batches' labels, encoded as in training.

    Args:
        module: on any device.
        batches: images (B, C, H, W) in [-1, 1], (images, labels) or {"image": ..., "label": ...}.
        log_snr: levels, rising and finite, shape (L,).
        weights: online, ema, ema:NAME or FILE.safetensors.
        seed: of the noise.
    """
    with evaluating(module.network):
        return _curve(
            measured_module(module, batches, weights, seed), log_snr, module.objective.schedule, seed
        )


def exact_mmse_curve(mixture: GaussianMixture, log_snr: Tensor, draws: int = 2**13) -> MMSECurve:
    """The least errors that a denoiser can have on a mixture: the floor under `mmse_curve`.

    Exact in one dimension. In more, the errors at all levels come from the same draws and are taken to move together,
    which bounds the standard error of an integral from above.
    """
    log_snr = _checked(log_snr)
    least = mixture.estimate_mmse(ContinuousCosineSchedule().at(log_snr), draws)
    second = mixture.weights @ (mixture.means.square().sum(1) + mixture.dimensions * mixture.stds**2)
    mean, error = (log_snr.exp() * part for part in least)
    error = torch.cat([torch.zeros(1), error])
    exact = Moments(torch.cat([second[None], mean]), error.outer(error), draws)
    return MMSECurve(log_snr, exact, mixture.dimensions)


def _curve(stream: Iterable[Measured], log_snr: Tensor, schedule: Schedule, seed: int) -> MMSECurve:
    log_snr = _checked(log_snr)
    first, stream = peek(stream)
    rows = (_errors(batch, log_snr, schedule, generator(seed, i)) for i, batch in enumerate(stream))
    found = moments(rows)
    broken = log_snr[~found.mean[1:-1].isfinite()]
    if len(broken):
        raise ValueError(
            f"Found errors that are NaN or infinite at log-SNR {broken.tolist()}; expected a denoiser that is finite "
            "there: leave these levels out, or look for what breaks in it."
        )
    return MMSECurve(log_snr, found.controlled(1), first.x0[0].numel())


def _errors(batch: Measured, log_snr: Tensor, schedule: Schedule, source: torch.Generator) -> Tensor:
    """|x_0|^2, then |eps - eps_hat|^2 at each level, then |eps|^2 - D as a control, shape (B, L + 2)."""
    noise = draw_noise(batch.x0, source)
    levels = (schedule.at(at.expand(len(noise))) for at in log_snr)
    errors = [noise_error(batch, noise, level) for level in levels]
    return torch.stack([power(batch.x0), *errors, surplus(noise)], 1)


def _checked(log_snr: Tensor) -> Tensor:
    log_snr = log_snr.detach().double().cpu()
    if (
        log_snr.ndim != 1
        or len(log_snr) < 2
        or not bool((log_snr.isfinite().all() & (log_snr.diff() > 0)).all())
    ):
        raise ValueError(
            f"Found log_snr={log_snr.tolist()}; expected at least two finite levels that rise, such as "
            "torch.linspace(-10, 14, 49)."
        )
    return log_snr


def _integrals(x: Tensor) -> Tensor:
    """(L, L): row l integrates values at x over x below x[l].

    Between neighbouring points, values over sig(x) are interpolated by a polynomial: they change little at either end,
    and are constant for Gaussian data of deviation 1. Below x[0] they are held constant.
    """
    order = min(_NEIGHBOURS, len(x))
    first = (torch.arange(len(x) - 1) - (order // 2 - 1)).clamp(0, len(x) - order)
    nodes = first[:, None] + torch.arange(order)
    half = x.diff()[:, None] / 2
    local = (x[nodes] - x[:-1, None]) / half - 1  # the interval is [-1, 1]
    point, weight = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(_POINTS))
    weight = half * weight * (x[:-1, None] + half * (1 + point)).sigmoid()
    powers = torch.arange(order, dtype=x.dtype)
    weights = torch.linalg.solve(local[:, None] ** powers[:, None], weight @ point[:, None] ** powers)
    rows = torch.zeros(len(half), len(x), dtype=x.dtype).scatter(1, nodes, weights)
    integrals = torch.cat([torch.zeros(1, len(x), dtype=x.dtype), rows.cumsum(0)])
    integrals[:, 0] += softplus(x[0])
    return integrals / x.sigmoid()
