r"""What can be known about clean data at a noise level, exactly, where the data are a Gaussian mixture.

    x_0 ~ sum_k w_k N(mu_k, s_k^2 I)           x_t = alpha x_0 + sigma eps, in D dimensions
    T_k = alpha^2 s_k^2 + sigma^2              variance of x_t within component k
    r_k = P(k | x_t)                           responsibilities
    E[x_0 | x_t, k]   = mu_k + alpha s_k^2 / T_k (x_t - alpha mu_k)
    Var[x_0 | x_t, k] = s_k^2 sigma^2 / T_k    per dimension

What x_t tells of a target y = p x_0 + q eps is h(x_t) + h(y) - h(x_0) - h(eps) - D ln|alpha q - sigma p|. With
I(k; z) = H(k) - E[H(r)], r those of z, be it x_t, y or x_0:

    I(y; x_t)  = I(k; x_t) + I(k; y) - I(k; x_0) + sum_k w_k D/2 ln(1 + c_k^2 / (s_k (alpha q - sigma p))^2)
    c_k        = alpha p s_k^2 + sigma q           covariance of y and x_t within component k
    I(x_0; x_t) = I(k; x_t) + sum_k w_k D/2 ln(1 + SNR s_k^2)

Nats, sums over dimensions, float64. Information depends on SNR alone, whatever the scaling of the process. All is
finite at alpha = 0 and sigma = 0 but what x_t tells of x_0 at sigma = 0 and of eps at alpha = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.targets import X0, Epsilon, Score, Target, V

_TINY = 1e-60  # a variance that is positive and whose reciprocal times a squared distance is finite
_REACH = 12.0  # standard deviations beyond which a Gaussian's mass, 4e-33, is dropped
_NODES = 16  # of Gauss and Legendre, in each interval of half a standard deviation
_DRAWS = 2**13


class Estimate(NamedTuple):
    """Values and their standard errors, of one shape, (B,) or (); the errors are zero where quadrature is exact."""

    value: Tensor
    standard_error: Tensor


class InformationCurves(NamedTuple):
    """What x_t tells of x_0, of the noise (and of the score, its multiple) and of v, nats per sample, shape (B,)."""

    log_snr: Tensor
    x0: Estimate
    epsilon: Estimate
    v: Estimate


class _Posterior(NamedTuple):
    """P(k | x_t), shape (N, K), and E[x_0 | x_t, k], K tensors (N, D)."""

    responsibility: Tensor
    means: list[Tensor]

    @property
    def mean(self) -> Tensor:
        """E[x_0 | x_t], shape (N, D)."""
        return torch.stack([r[:, None] * m for r, m in self._components()]).sum(0)

    @property
    def spread(self) -> Tensor:
        """What not knowing the component adds to Var[x_0 | x_t], summed over dimensions, shape (N,)."""
        mean = self.mean
        return torch.stack([r * (m - mean).square().sum(1) for r, m in self._components()]).sum(0)

    @property
    def doubt(self) -> Tensor:
        """Entropy of the component given x_t, in nats, shape (N,)."""
        return self.responsibility.xlogy(self.responsibility).sum(1).neg()

    def _components(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.responsibility.unbind(1), self.means, strict=True)


_Function = Callable[[_Posterior], Tensor]


class GaussianMixture:
    """Isotropic Gaussians: data whose best denoiser, error and information are known.

    Args:
        weights: share of each component, shape (K,), summing to 1.
        means: shape (K, D).
        stds: standard deviations, shape (K,); 0 puts a component's mass on its mean.
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Sequence[Sequence[float]] | Tensor,
        stds: Sequence[float] | Tensor,
    ) -> None:
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.stds = torch.as_tensor(stds, dtype=torch.float64)
        self._check()

    def __repr__(self) -> str:
        return f"GaussianMixture({len(self.weights)} components in {self.dimensions} dimensions)"

    @property
    def dimensions(self) -> int:
        """D."""
        return self.means.shape[1]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws, shape (n, D), float64."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dimensions, dtype=torch.float64, generator=generator)
        return self.means[component] + self.stds[component, None] * noise

    def log_prob(self, x: Tensor, level: NoiseLevel | None = None) -> Tensor:
        """Log-density of x_0 at x, or of x_t at a level (B,); x of shape (B, ...), result (B,)."""
        x = x.flatten(1).double()
        level = level or NoiseLevel(torch.ones(len(x)), torch.zeros(len(x)))
        return self._log_joint(x, _double(level)).logsumexp(1)

    def denoise(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """E[x_0 | x_t], shape (B, ...) and dtype of x_t: the exact denoiser."""
        mean = self._posterior(x_t.flatten(1).double(), _double(level)).mean
        return mean.reshape(x_t.shape).to(x_t.dtype)

    def mmse(self, level: NoiseLevel, draws: int = _DRAWS) -> Tensor:
        """Least E|x_0 - x_0_hat|^2, summed over dimensions, at each level (B,); see `estimate_mmse`."""
        return self.estimate_mmse(level, draws).value

    def mutual_information(self, level: NoiseLevel, draws: int = _DRAWS, target: Target = X0()) -> Tensor:
        """I(y; x_t) in nats per sample at each level (B,), y = x_0 or any target; see `estimate_mutual_information`."""
        return self.estimate_mutual_information(level, draws, target).value

    def estimate_mmse(self, level: NoiseLevel, draws: int = _DRAWS) -> Estimate:
        """`mmse` with its standard error.

        In one dimension by quadrature. In more, the variance within components is exact, and only what not
        knowing the component adds is averaged over `draws` fixed draws from each component.
        """
        level = _double(level)
        within = self.stds**2 * level.sigma[:, None] ** 2 / self._total(level)
        between, error = self._expect(lambda posterior: posterior.spread, [(1, level)], draws)
        return Estimate(self.dimensions * within @ self.weights + between, error)

    def estimate_mutual_information(
        self, level: NoiseLevel, draws: int = _DRAWS, target: Target = X0()
    ) -> Estimate:
        """`mutual_information` with its standard error; only E[H(r)] is not in closed form.

        In more than one dimension x_t, y and x_0 share their draws, so that errors cancel where informations do.
        """
        level, y = _double(level), _as_level(target, _double(level))
        clean = NoiseLevel(torch.ones_like(level.alpha), torch.zeros_like(level.alpha))
        signed = [(1, level)] if isinstance(target, X0) else [(1, level), (1, y), (-1, clean)]
        doubt, error = self._expect(lambda posterior: posterior.doubt, signed, draws)
        known = -self.weights.xlogy(self.weights).sum() - doubt
        return Estimate(known + self.dimensions / 2 * self._within(level, y) @ self.weights, error)

    def _check(self) -> None:
        shapes = tuple(tuple(part.shape) for part in (self.weights, self.means, self.stds))
        k = self.weights.numel()
        if self.means.ndim != 2 or shapes != ((k,), (k, self.means.shape[-1]), (k,)):
            raise ValueError(
                f"weights, means and stds have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}, "
                "expected (K,), (K, D) and (K,): one row of means per component."
            )
        if (self.weights <= 0).any() or not torch.isclose(self.weights.sum(), self.weights.new_ones(())):
            raise ValueError(f"weights are {self.weights.tolist()}, expected positive numbers that sum to 1.")
        if not (self.stds >= 0).all() or not self.means.isfinite().all():
            raise ValueError(f"stds are {self.stds.tolist()}; expected stds of 0 or more, and finite means.")

    def _total(self, level: NoiseLevel) -> Tensor:
        """T_k, shape (B, K)."""
        return ((level.alpha[:, None] * self.stds) ** 2 + level.sigma[:, None] ** 2).clamp(min=_TINY)

    def _within(self, level: NoiseLevel, y: NoiseLevel) -> Tensor:
        """ln(1 + c_k^2 / (s_k (alpha q - sigma p))^2), shape (B, K)."""
        covariance = (level.alpha * y.alpha)[:, None] * self.stds**2 + (level.sigma * y.sigma)[:, None]
        determinant = (level.alpha * y.sigma - level.sigma * y.alpha)[:, None]
        ratio = covariance / (self.stds * determinant)
        return torch.where(covariance == 0, 0.0, ratio**2).log1p()

    def _log_joint(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """ln w_k + ln N(x; alpha mu_k, T_k I), shape (B, K)."""
        total = self._total(level)
        distance = torch.stack([(x - level.alpha[:, None] * mean).square().sum(1) for mean in self.means], 1)
        log_normal = -(distance / total + self.dimensions * (2 * torch.pi * total).log()) / 2
        return self.weights.log() + log_normal

    def _posterior(self, x: Tensor, level: NoiseLevel) -> _Posterior:
        total, alpha = self._total(level), level.alpha[:, None]
        gain = alpha * self.stds**2 / total
        means = [mu + g[:, None] * (x - alpha * mu) for mu, g in zip(self.means, gain.unbind(1), strict=True)]
        return _Posterior(self._log_joint(x, level).softmax(1), means)

    def _expect(self, function: _Function, signed: Sequence[tuple[int, NoiseLevel]], draws: int) -> Estimate:
        """The sum of +-E[f(x_t)] over several levels, each of shape (B,)."""
        batch = len(signed[0][1].alpha)
        rows = [[(sign, _row(level, i)) for sign, level in signed] for i in range(batch)]
        exact = self.dimensions == 1
        sums = [self._sum(function, row) if exact else self._mean(function, row, draws) for row in rows]
        return Estimate(*(torch.stack(parts) for parts in zip(*sums, strict=True)))

    def _sum(self, function: _Function, row: list[tuple[int, NoiseLevel]]) -> Estimate:
        value = torch.stack([sign * self._quadrature(function, level) for sign, level in row]).sum()
        return Estimate(value, torch.zeros_like(value))

    def _mean(self, function: _Function, row: list[tuple[int, NoiseLevel]], draws: int) -> Estimate:
        drawn = torch.stack([sign * self._monte_carlo(function, level, draws) for sign, level in row]).sum(0)
        return Estimate(drawn.mean(), drawn.std() / len(drawn) ** 0.5)

    def _quadrature(self, function: _Function, level: NoiseLevel) -> Tensor:
        """E[f(x_t)] by Gauss and Legendre between all components' half standard deviations: none is missed."""
        steps = torch.linspace(-_REACH, _REACH, int(4 * _REACH) + 1, dtype=torch.float64)
        edges = (level.alpha * self.means + self._total(level).sqrt().T * steps).flatten().sort().values
        x, weight = _gauss_legendre(edges)
        x, at = x[:, None], level.expand(len(x))
        density = self.log_prob(x, at).exp()
        return (weight * density * function(self._posterior(x, at))).sum()

    def _monte_carlo(self, function: _Function, level: NoiseLevel, draws: int) -> Tensor:
        """f(x_t), mean of each pair of opposite noises, shape (draws / 2,).

        The same noise around every component, so that the weights are exact; opposite, so that what is linear in the
        noise, most of it at low SNR, cancels.
        """
        noise = torch.randn(
            (draws + 1) // 2, self.dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        noise = torch.cat([noise, -noise])
        centres, widths, at = level.alpha * self.means, self._total(level).sqrt()[0], level.expand(len(noise))
        values = [function(self._posterior(c + w * noise, at)) for c, w in zip(centres, widths, strict=True)]
        return (self.weights @ torch.stack(values)).reshape(2, -1).mean(0)


def information_curves(mixture: GaussianMixture, log_snr: Tensor, draws: int = _DRAWS) -> InformationCurves:
    """I(x_0; x_t), I(eps; x_t) = I(score; x_t) and I(v; x_t) over log-SNR (B,), for every process alike.

    Against time, give `schedule.log_snr(t)`. Infinite where they are: x_0 at log-SNR inf and eps at -inf if x_0 has a
    density; eps and v everywhere in between if it is a finite set, whose points x_t singles out.
    """
    log_snr = log_snr.double()
    level = NoiseLevel(log_snr.sigmoid().sqrt(), log_snr.neg().sigmoid().sqrt())
    targets = (X0(), Epsilon(), V())
    return InformationCurves(
        log_snr, *(mixture.estimate_mutual_information(level, draws, y) for y in targets)
    )


def _as_level(target: Target, level: NoiseLevel) -> NoiseLevel:
    """y = p x_0 + q eps as a level (p, q); the score is a multiple of eps, which is finite at sigma = 0."""
    return NoiseLevel(*(Epsilon() if isinstance(target, Score) else target).row(level))


def _row(level: NoiseLevel, i: int) -> NoiseLevel:
    return NoiseLevel(level.alpha[i : i + 1], level.sigma[i : i + 1])


def _double(level: NoiseLevel) -> NoiseLevel:
    return NoiseLevel(level.alpha.double(), level.sigma.double())


def _gauss_legendre(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of composite quadrature between sorted edges, both flat."""
    node, weight = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(_NODES))
    half = edges.diff()[:, None] / 2
    return (edges[:-1, None] + half * (1 + node)).flatten(), (half * weight).flatten()
