"""What does it cost or save to draw noise levels elsewhere, the expected gradient being the same?

    OMP_NUM_THREADS=1 python benchmarks/density_variance.py [--steps 800] [--dimensions 64] [--batches 200]

Data and network of `mixture_excess`. The network is trained for `--steps` steps, then frozen. Two tables:

variance    trace of the covariance of the gradient of a batch of 64, by where its levels fall, relative to the
            intended density. `z` is the largest deviation of the mean gradient from the intended one's, along ten
            random directions, in standard errors: below 3.5 in nine of ten tables.
statistics  at seven quantiles of the intended density, relative to their mean: sqrt(E|g|^2) of the true gradient of a
            sample, the statistic of AdaptiveDensity, which stands for it, and sqrt(E[loss^2]).
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from mixture_excess import MLP
from torch import Tensor, nn

import lightning_diffusion as ld
from lightning_diffusion.analysis.information import GaussianMixture

OBJECTIVES = {
    "EDM": ld.EDM(),
    "EDM, min-SNR": ld.EDM(weighting=ld.MinSNR()),
    "DDPM": ld.DDPM(),
    "v": ld.VPrediction(),
    "flow": ld.RectifiedFlow(),
}
QUANTILES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
BATCH, PER_LEVEL = 64, 192


class Drawn(NamedTuple):
    """Gradients of batches along their mean and in size: directions (batches, 10), variance ()."""

    along: Tensor
    variance: float


def mixture(dimensions: int) -> GaussianMixture:
    """Ten components of deviation 0.2, means of deviation 0.45: of deviation 0.5 in all."""
    means = 0.45 * torch.randn(10, dimensions, generator=torch.Generator().manual_seed(0))
    return GaussianMixture([0.1] * 10, means, [0.2] * 10)


def train(objective: ld.DiffusionObjective, data: GaussianMixture, steps: int) -> nn.Module:
    """An MLP after so many steps of Adam, batches of 128."""
    torch.manual_seed(0)
    network, generator = MLP(data.dimensions), torch.Generator().manual_seed(1)
    nn.init.normal_(network.head.weight, std=0.01)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        x0 = data.sample(128, generator).float()
        objective.loss(network, x0, key=ld.RandomKey(0, 0, step)).loss.backward()
        optimizer.step()
    return network


def gradient(loss: Tensor, network: nn.Module) -> Tensor:
    """Of all parameters, flat."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def measure(
    objective: ld.DiffusionObjective, network: nn.Module, data: GaussianMixture, batches: int
) -> Drawn:
    """Gradients of batches; a density that learns has 300 batches to do so."""
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(10, sum(p.numel() for p in network.parameters()), generator=generator)
    if objective.density.learns:
        for batch in range(300):
            objective.loss(network, data.sample(BATCH, generator).float(), key=ld.RandomKey(1, 0, batch))
    rows, total, squares = [], 0.0, 0.0
    for batch in range(batches):
        x0 = data.sample(BATCH, generator).float()
        g = gradient(objective.loss(network, x0, key=ld.RandomKey(2, 0, batch)).loss, network).double()
        rows.append(directions.double() @ g)
        total, squares = total + g, squares + float(g.square().sum())
    mean = total / batches
    return Drawn(torch.stack(rows), (squares - batches * float(mean.square().sum())) / (batches - 1))


def variances(
    objective: ld.DiffusionObjective, network: nn.Module, data: GaussianMixture, batches: int
) -> None:
    """Print the first table."""
    wide = ld.LogNormalSigma(-0.6, 2.0)
    ways = {
        "intended": objective,
        "log-normal, wide": objective.with_density(wide),
        "weight absorbed": objective.absorb_weight(),
        "adaptive": objective._changed(density=ld.AdaptiveDensity(objective.density)),
    }
    base = None
    for name, way in ways.items():
        found = measure(way, network, data, batches)
        base = base or found
        error = ((found.along.var(0) + base.along.var(0)) / batches).sqrt()
        z = ((found.along.mean(0) - base.along.mean(0)).abs() / error).max()
        print(f"  {name:18} {found.variance / base.variance:6.2f}   z {z:.1f}", flush=True)


def sample_sizes(
    objective: ld.DiffusionObjective, network: nn.Module, data: GaussianMixture
) -> dict[str, Tensor]:
    """The three statistics at each quantile, (7,) each."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    u = torch.tensor(QUANTILES, dtype=torch.float64)
    for log_snr in objective.density.quantile(u, objective.schedule):
        x0 = data.sample(PER_LEVEL, generator).float()
        level = objective.schedule.at(log_snr.repeat(PER_LEVEL)).to(x0)
        noise = torch.randn(x0.shape, generator=generator)
        report = objective.loss_at(network, x0, noise, level)
        true = [
            gradient(loss, network).square().sum() for loss in single(objective, network, x0, noise, level)
        ]
        statistic = objective.weight(level) * report.per_sample
        rows.append(
            torch.stack([torch.stack(true).mean(), statistic.mean(), report.per_sample.square().mean()])
        )
    sizes = torch.stack(rows).detach().sqrt()
    return dict(zip(("true gradient", "statistic", "loss"), (sizes / sizes.mean(0)).T, strict=True))


def single(
    objective: ld.DiffusionObjective, network: nn.Module, x0: Tensor, noise: Tensor, level: ld.NoiseLevel
) -> Iterator[Tensor]:
    """The loss of each sample by itself."""
    for i in range(len(x0)):
        at = ld.NoiseLevel(level.alpha[i : i + 1], level.sigma[i : i + 1])
        yield objective.loss_at(network, x0[i : i + 1], noise[i : i + 1], at).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--dimensions", type=int, default=64)
    parser.add_argument("--batches", type=int, default=200)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    data = mixture(options.dimensions)
    for name, objective in OBJECTIVES.items():
        network = train(copy.deepcopy(objective), data, options.steps)
        print(f"{name}, {options.dimensions} dimensions, after {options.steps} steps")
        variances(objective, network, data, options.batches)
        for statistic, values in sample_sizes(objective, network, data).items():
            print(f"  {statistic:18} {json.dumps([round(v, 2) for v in values.tolist()])}", flush=True)


if __name__ == "__main__":
    main()
