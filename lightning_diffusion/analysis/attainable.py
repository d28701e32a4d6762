r"""What loss can be attained at a noise level: by the best linear denoiser, and by the best of all where it is known.

    v_j           variances of x_0 along D orthonormal directions, s^2 their mean
    linear(SNR) = 1/D sum_j v_j / (1 + SNR v_j)         E|x_0 - x_0_hat|^2 per dimension, of the best affine denoiser
                                                        that keeps to these directions (Wiener's filter)
    share(SNR)  = E|x_0 - x_0_hat|^2 (1 + s^2 SNR) / s^2  at most 1: what is left of the error at variance s^2 alone
    loss        = w D_own^2 s^2 / (alpha^2 s^2 + sigma^2) share

with w the objective's weight and D_own the determinant of the space that its network puts out (see `targets`): the
expectation of `Report.per_sample` for a network that is that denoiser. Finite at alpha = 0 and sigma = 0 wherever w is.

Directions are the principal components where the data have at most 1,024 dimensions. In larger images they are
Fourier modes, and principal components of the channels at each frequency: the best linear filter that treats all
places alike, whose error bounds that of the best linear denoiser from above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_diffusion.analysis.information import GaussianMixture
from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.objective import DiffusionObjective
from lightning_diffusion.schedules import ContinuousCosineSchedule

_DIMENSIONS = 1024
_GRID = torch.linspace(-24, 24, 385, dtype=torch.float64)  # log-SNR plus 2 ln s
_COARSE = 4  # of the grid, every so many-th for what is drawn
Mean = Callable[[Tensor], Tensor]


class Attainable:
    """The loss of a denoiser whose error is known, at any level.

    Args:
        objective: that is trained.
        variance: s^2, the mean variance of x_0.
        share: of the error at that variance alone, at log-SNR + ln s^2 = `grid`.
        grid: even and rising, -24 to 24 in steps of 1/8 if not given; held constant beyond its ends.
    """

    def __init__(
        self, objective: DiffusionObjective, variance: float, share: Tensor, grid: Tensor = _GRID
    ) -> None:
        self.objective, self.variance, self.share = objective, variance, share
        self._low, self._step = float(grid[0]), float(grid[1] - grid[0])

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Expected weighted loss, shape (B,)."""
        preconditioning = self.objective.preconditioning
        scale = preconditioning.determinant(preconditioning.output_space, level).square()
        signal, noise = level.alpha.square() * self.variance, level.sigma.square()
        share = self._share(signal.log() - noise.log())
        return self.objective.weight(level) * scale * self.variance / (signal + noise) * share

    def _share(self, x: Tensor) -> Tensor:
        self.share = self.share.to(x, non_blocking=True)
        place = ((x - self._low) / self._step).clamp(0, len(self.share) - 1)
        left = place.long().clamp(max=len(self.share) - 2)
        return torch.lerp(self.share[left], self.share[left + 1], place - left)


def linear_attainable(objective: DiffusionObjective, variances: Tensor) -> Attainable:
    """Of the best linear denoiser of data with these variances (D,), all finite and one of them above 0."""
    variances = variances.double().cpu()
    mean = variances.mean()
    relative = variances / mean
    share = torch.stack([(relative * (1 + snr) / (1 + relative * snr)).mean() for snr in _GRID.exp()])
    return Attainable(objective, float(mean), share)


def exact_attainable(
    objective: DiffusionObjective, mixture: GaussianMixture, scale: float = 1.0, labelled: float = 0.0
) -> Attainable:
    """Of the best denoiser of a mixture: the floor under every network.

    Args:
        objective: that is trained.
        mixture: of the samples.
        scale: x_0 = scale * sample + constant.
        labelled: share of draws in which the network is told the component.
    """
    weights, D = mixture.weights, mixture.dimensions
    centre = weights @ mixture.means
    variance = scale**2 * float(weights @ (mixture.stds**2 + (mixture.means - centre).square().mean(1)))
    grid = _GRID[::_COARSE]
    log_snr = grid + torch.tensor(scale**2 / variance).log()  # of the mixture as it is
    level = ContinuousCosineSchedule().at(log_snr)
    told = mixture.stds**2 / (1 + log_snr.exp()[:, None] * mixture.stds**2) @ weights
    error = labelled * told + (1 - labelled) * mixture.mmse(level, 2**11) / D
    return Attainable(objective, variance, scale**2 * error * (1 + grid.exp()) / variance, grid)


@torch.no_grad()
def measured_variances(stream: Iterable[Tensor], mean: Mean = lambda x: x, samples: int = 4096) -> Tensor:
    """Variances of data along the directions above, shape (D,), float64 on the CPU.

    Args:
        stream: batches x_0 (B, ...).
        mean: of a tensor over all processes.
        samples: at which to stop, in this process.

    Raises:
        ValueError: if nothing comes.
    """
    count, first, second = 0, torch.zeros(()), torch.zeros(())
    for batch in stream:
        modes = _modes(batch[: samples - count].double().cpu())
        count, first = count + len(modes), first + modes.sum(0)
        second = second + torch.einsum("nfc,nfd->fcd", modes, modes.conj())
        if count >= samples:
            break
    if not count:
        raise ValueError("Found no data; expected at least one batch of samples.")
    first, second = mean(first / count), mean(second / count)
    covariance = second - first[:, :, None] * first[:, None].conj()
    variances: Tensor = torch.linalg.eigvalsh(covariance).clamp(min=0).flatten()
    return variances


def _modes(x: Tensor) -> Tensor:
    """Coordinates whose covariance is taken among the last axis only, shape (B, F, C), F C = D."""
    if x[0].numel() <= _DIMENSIONS:
        return x.flatten(1)[:, None]
    images = x.reshape(len(x), *(1,) * (3 - x[0].ndim), *x.shape[1:]) if x[0].ndim < 3 else x
    modes: Tensor = torch.fft.fft2(images, norm="ortho").flatten(2).transpose(1, 2)
    return modes
