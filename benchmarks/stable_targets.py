"""When do stable targets help, and what do they cost?

    python benchmarks/stable_targets.py [--draws 20000]

The regression target of a sample varies about what the network can learn, E[R | x_t], known exactly for mixtures and
for a finite training set. Table 1: how much of that variance is left, stable over plain, by dimension, number of
references and whether they share a label, at levels of log-SNR, and over EDM's levels (density of mean -1.2, std 1.2).
Data: ten Gaussians of deviation 0.2 about means of deviation 0.45, the component as label; and the digits.
Table 2: milliseconds that they add to a step, by references and dimension, one batch of 64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from mixture_excess import mixture_of
from torch import Tensor

from lightning_diffusion import EDM, EDMSchedule, NoiseLevel, RandomKey, StableTarget
from lightning_diffusion.analysis.information import GaussianMixture
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.stable_targets import References

LEVELS = (-6.0, -3.0, -1.0, 1.0, 3.0, 6.0)
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
Denoise = Callable[[Tensor, NoiseLevel, Tensor], Tensor]


def variances(
    draw: Draw,
    denoise: Denoise,
    references: int,
    labelled: bool,
    level: Callable[[int], NoiseLevel],
    draws: int,
) -> tuple[float, float]:
    """E|R - E[R | x_t]|^2 of plain and of stable targets."""
    generator, stable = torch.Generator().manual_seed(0), StableTarget()
    rows, totals = min(references, 64), torch.zeros(2).double()
    for _ in range(max(draws // rows, 1)):
        x0, label = draw(references, generator)
        own, noise, here = (
            x0[:rows],
            torch.randn(x0[:rows].shape, generator=generator).to(x0),
            level(rows).to(x0),
        )
        exact = denoise(here.diffuse(own, noise), here, label[:rows])
        known = References(x0, label if labelled else None)
        given = label[:rows] if labelled else None
        x_bar, _ = stable.posterior(own, noise, here, known, given)
        # at fixed x_t an error of x_0 is one of R times sqrt(V) / (sigma sigma_data)
        scale = (here.variance(0.5).sqrt() / (0.5 * here.sigma))[:, None]
        totals += torch.stack([(scale * (x - exact).flatten(1)).square().sum() for x in (own, x_bar)])
    return totals[0].item(), totals[1].item()


def mixture_case(dimensions: int, labelled: bool) -> tuple[Draw, Denoise]:
    mixture = mixture_of(dimensions)
    alone = [GaussianMixture([1.0], mixture.means[k : k + 1], mixture.stds[k : k + 1]) for k in range(10)]

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        label = torch.randint(10, (n,), generator=generator)
        noise = torch.randn(n, dimensions, generator=generator, dtype=torch.float64)
        return mixture.means[label] + mixture.stds[label, None] * noise, label

    def denoise(x_t: Tensor, level: NoiseLevel, label: Tensor) -> Tensor:
        if not labelled:
            return mixture.denoise(x_t, level)
        guesses = torch.stack([part.denoise(x_t, level) for part in alone])
        return guesses[label, torch.arange(len(x_t))]

    return draw, denoise


def digits_case(labelled: bool) -> tuple[Draw, Denoise]:
    """The training digits; what can be learned is the posterior mean over all of them."""
    data = DigitsDataModule().training_data()
    images = (data.images - data.images.mean()).flatten(1).double() * (0.5 / data.images.std())
    labels: Tensor = data.labels  # type: ignore[assignment]
    everything = References(images, labels if labelled else None)

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(images), generator=generator)[:n]
        return images[chosen], labels[chosen]

    def denoise(x_t: Tensor, level: NoiseLevel, label: Tensor) -> Tensor:
        logits = -torch.cdist(x_t / level.alpha[:, None], images).square() / (2 * level.sigma[:, None] ** 2)
        logits = logits.masked_fill((label[:, None] != labels) & labelled, -torch.inf)
        return logits.softmax(1) @ everything.x0

    return draw, denoise


def levels_at(log_snr: float, batch: int) -> NoiseLevel:
    return EDMSchedule().at(torch.full((batch,), log_snr, dtype=torch.float64))


def levels_of_training(batch: int) -> NoiseLevel:
    return EDMSchedule().at(EDM().density.draw(batch, EDMSchedule(), RandomKey()))


def left(case: tuple[Draw, Denoise], references: int, labelled: bool, draws: int) -> list[float]:
    """Variance left at each level, and over training's levels."""
    at = [partial(levels_at, log_snr) for log_snr in LEVELS] + [levels_of_training]
    pairs = [variances(*case, references, labelled, level, draws) for level in at]
    return [stable / plain for plain, stable in pairs]


def first_table(draws: int) -> None:
    print("| data | references | labels | " + " | ".join(f"{x:g}" for x in LEVELS) + " | EDM's levels |")
    print("|" + "---|" * (4 + len(LEVELS)))
    for name, make in {
        "mixture, 2-D": partial(mixture_case, 2),
        "mixture, 64-D": partial(mixture_case, 64),
        "digits": digits_case,
    }.items():
        for labelled in (False, True):
            for references in (64, 512) + ((1531,) if name == "digits" else (4096,)):
                shares = left(make(labelled), references, labelled, draws)
                cells = " | ".join(f"{share:.2f}" for share in shares)
                print(f"| {name} | {references} | {'same' if labelled else 'none'} | {cells} |", flush=True)


def second_table(rounds: int = 30) -> None:
    print("\n| dimensions | " + " | ".join(f"{n:,} references" for n in (64, 1531, 10_000, 50_000)) + " |")
    print("|---|---|---|---|---|")
    for dimensions in (64, 3072, 16_384):
        cells = []
        for references in (64, 1531, 10_000, 50_000):
            if references * dimensions > 2e8:
                cells.append("")
                continue
            x0 = torch.randn(references, dimensions)
            noise, level = torch.randn(64, dimensions), levels_of_training(64).to(x0)
            stable, times = StableTarget(), []
            for _ in range(rounds):
                start = time.perf_counter()
                stable.posterior(x0[:64], noise, level, References(x0), None)
                times.append(1e3 * (time.perf_counter() - start))
            cells.append(f"{sorted(times)[rounds // 2]:.1f} ms")
        print(f"| {dimensions} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=20_000)
    first_table(parser.parse_args().draws)
    second_table()


if __name__ == "__main__":
    main()
