r"""Where an objective draws, how much each draw counts, and what is there to learn.

u        middles of n equal parts of (0, 1), so that each level stands for the same share of draws
weight   of the error of the unit-variance residual R, importance weights included      shape (n,)
gain     share of R's variance that the best linear denoiser explains: 0 where x_t tells nothing of x_0 (all is
         noise) and where nothing is left to remove                                      shape (n,)
KL       of a Gaussian fitted to x_T, from the N(0, sigma^2 I) that sampling starts with, in nats:
         1/2 sum_j (SNR v_j - ln(1 + SNR v_j)) + 1/2 SNR |mean|^2       v_j variances along orthonormal directions
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_diffusion.analysis.attainable import linear_attainable, measured_variances
from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.objective import DiffusionObjective

DRAWS = 4000
_LEARNABLE = 0.01  # of the residual's variance
_VISIBLE = 1 / 255  # of the range [-1, 1], half a step of 8 bits: noise below it is not seen
_ENDS = 20.0  # log-SNR beyond which a level is told from none


@dataclass(frozen=True)
class DataMoments:
    """Variances along orthonormal directions (D,), |mean|^2 summed over elements, in units of x_0; samples (N, ...)."""

    variances: Tensor
    mean_power: float

    @classmethod
    def of(cls, x0: Tensor) -> DataMoments:
        """Of samples (N, ...)."""
        return cls(measured_variances([x0]), float(x0.double().mean(0).square().sum()))

    @property
    def variance(self) -> float:
        """Mean over directions."""
        return float(self.variances.mean())


@dataclass(frozen=True)
class TrainedLevels:
    """An objective seen at its own draws, on data of known variances."""

    objective: DiffusionObjective
    data: DataMoments
    log_snr: Tensor
    weight: Tensor
    gain: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, objective: DiffusionObjective, data: DataMoments) -> TrainedLevels:
        """By quantiles of the density; everything (n,), float64, noisiest levels last."""
        u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
        log_snr = objective.density.quantile(u, objective.schedule)
        weight = objective._weight_on_residual(log_snr).double()
        importance = objective.density.importance(log_snr, objective.schedule)
        weight = weight if importance is None else weight * importance
        return cls(objective, data, log_snr, weight, gain_at(data, log_snr, objective))

    @property
    def idle_noise(self) -> float:
        """Share of draws so noisy that x_t tells nothing of x_0."""
        return _share((self.gain < _LEARNABLE) & (self.log_snr < self._middle))

    @property
    def idle_clean(self) -> float:
        """Share of draws with nothing to remove: noise of half an 8-bit step of data in [-1, 1], or no gain."""
        unseen = self.log_snr + math.log(self.data.variance) > -2 * math.log(_VISIBLE)
        return _share(unseen | ((self.gain < _LEARNABLE) & (self.log_snr > self._middle)))

    @property
    def _middle(self) -> float:
        return -math.log(self.data.variance)

    @property
    def span(self) -> float:
        """The largest weight over the smallest, but for half a hundredth of the draws at either end."""
        kept = self._inner[self._inner > 0]
        return float(kept.max() / kept.min()) if len(kept) else math.inf

    @property
    def unweighted(self) -> float:
        """Share of draws of weight 0."""
        return _share(self.weight <= 0)

    @property
    def _inner(self) -> Tensor:
        cut = DRAWS // 200
        return self.weight[cut : DRAWS - cut]

    @property
    def concentration(self) -> float:
        """The smallest share of draws that has 90 % of the weight."""
        sums = self.weight.sort(descending=True).values.cumsum(0)
        return float((sums < 0.9 * sums[-1]).sum() + 1) / DRAWS

    @property
    def ends(self) -> tuple[float, float]:
        """Log-SNRs between which all but 1e-4 of the draws fall at either side, lowest first."""
        u = torch.tensor([1 - 1e-4, 1e-4], dtype=torch.float64)
        low, high = self.objective.density.quantile(u, self.objective.schedule).clamp(-_ENDS, _ENDS).tolist()
        return low, high


def gain_at(data: DataMoments, log_snr: Tensor, objective: DiffusionObjective) -> Tensor:
    """Share of the residual's variance that the best linear denoiser explains, shape (B,)."""
    attainable = linear_attainable(objective, data.variances)
    return 1 - attainable._share(log_snr.double() + math.log(data.variance))


@dataclass(frozen=True)
class Start:
    """Where sampling starts: the level, and the divergence of its N(0, sigma^2 I) from what training saw there."""

    level: NoiseLevel
    nats: float
    signal: float

    @classmethod
    def of(cls, levels: NoiseLevel, data: DataMoments) -> Start:
        """From sampling levels (n + 1,), noise first."""
        first = NoiseLevel(levels.alpha[0], levels.sigma[0])
        known = float(first.snr) * data.variances
        nats = float((known - known.log1p()).sum() + first.snr * data.mean_power) / 2
        strongest = float(known.max() + first.snr * data.mean_power) ** 0.5
        return cls(first, nats, strongest)


def amplification(objective: DiffusionObjective, levels: NoiseLevel) -> Tensor:
    """|x_0 error| over |error of the network's output|, in deviations of the data, at each level (B,)."""
    preconditioning = objective.preconditioning
    D = preconditioning.determinant(preconditioning.output_space, levels).abs()
    return levels.sigma / D / objective.sigma_data


def _share(chosen: Tensor) -> float:
    return float(chosen.double().mean())
