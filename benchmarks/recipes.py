"""The recipes side by side: the same network, data, optimizer and number of steps, another objective each.

    python benchmarks/recipes.py digits docs/results/recipes_digits.csv [--only edm ddpm] [--seeds 1 2 3]
    python benchmarks/recipes.py mixtures docs/results/recipes_mixtures.csv [--only edm ddpm]
    python benchmarks/recipes.py time docs/results/recipes_time.csv
    python benchmarks/recipes.py table docs/results

`digits` runs the command line for 600 steps of each recipe and seed and adds a row per run; rows, and runs in
runs/recipes, that are there are kept. Of the averaged weights it measures the Frechet distance of 1,797 samples (1 = as
many fresh real digits) and the share of them in which a classifier finds the asked digit, both as in digits_quality.py,
and the loss on held-out digits in a space common to all: the error of x_0_hat weighted as EDM does, in bins of log-SNR
of data of deviation 1.
`mixtures` trains an MLP on the mixtures of mixture_excess.py and divides its loss by that of the exact denoiser.
`time` measures a step (loss, backward, optimizer) of all recipes in turn: ratio to `edm`, median and quartiles.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch
import yaml
from digits_quality import COMPONENTS, Reference, grey_levels
from lightning.pytorch import seed_everything
from mixture_excess import BOUNDS, LOG_SNR, excess, mixture_of, train
from torch import Tensor

import lightning_diffusion as ld
from lightning_diffusion.commands.train import import_all_components
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.datamodules.digits import load_digits
from lightning_diffusion.metrics import frechet_distance

CONFIGS, RUNS = Path(__file__).parent.parent / "configs", Path("runs", "recipes")
RECIPES = sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml"))
STEPS, MIXTURE_STEPS, REPEATS = 600, 2000, 8
BIN_EDGES = torch.linspace(-8, 8, 9)


def train_digits(recipe: str, seed: int) -> ld.DiffusionModule:
    """The recipe after 600 steps from the command line."""
    checkpoint = RUNS / f"{recipe}-{seed}-1" / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        files = [CONFIGS / "digits.yaml", CONFIGS / "recipes" / f"{recipe}.yaml"]
        options = [f"--config={file}" for file in files] + [
            f"--seed_everything={seed}", f"--trainer.max_steps={STEPS}", "--trainer.callbacks=[PowerFunctionEMA]",
            "--trainer.check_val_every_n_epoch=1000", f"--runs={RUNS}", f"--name={recipe}-{seed}",
        ]  # fmt: skip
        command = [sys.executable, "-m", "lightning_diffusion", "fit", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if (found := torch.load(checkpoint, weights_only=True)["global_step"]) != STEPS:
        raise SystemExit(f"{checkpoint} stopped at step {found} of {STEPS}: remove its run folder.")
    return ld.DiffusionModule.load_from_checkpoint(checkpoint, map_location="cpu").eval()


@torch.no_grad()
def measure(module: ld.DiffusionModule, real: Reference) -> dict[str, float]:
    """Quality of samples, and loss per bin."""
    samples = grey_levels(module.sample(len(real.labels), {"label": real.labels}, weights="ema"))
    distance = frechet_distance(real.components(real.features), real.components(samples)).item()
    return {
        "frechet": distance / real.fresh_distance(len(samples)),
        "accuracy": float((real.classifier.predict(samples) == real.labels.numpy()).mean()),
        **losses(module),
    }


def losses(module: ld.DiffusionModule) -> dict[str, float]:
    """(SNR + 1) |x_0 - x_0_hat|^2 per dimension, for data of deviation 1, in each bin of log-SNR."""
    data = DigitsDataModule().held_out_data()
    x0 = module.representation.encode(data.images).repeat(REPEATS, *(1,) * (data.images.ndim - 1))
    label, deviation = data.labels.repeat(REPEATS), module.objective.sigma_data
    generator, found = torch.Generator().manual_seed(0), {}
    for low, high in itertools.pairwise(BIN_EDGES):
        share = (torch.randperm(len(x0), generator=generator) + 0.5) / len(x0)
        log_snr = low + (high - low) * share
        level = module.objective.schedule.at(log_snr - 2 * math.log(deviation))
        x_t = level.diffuse(x0, torch.randn(x0.shape, generator=generator))
        guess = module.denoiser({"label": label}, weights="ema")(x_t, level)
        error = ((guess - x0) / deviation).square().flatten(1).mean(1)
        found[f"loss {low:g}..{high:g}"] = ((log_snr.exp() + 1) * error).mean().item()
    return found


def run_digits(path: Path, only: list[str], seeds: list[int]) -> None:
    real = reference()
    done = {(row["recipe"], int(row["seed"])) for row in rows(path)}
    for seed in seeds:
        for recipe in only:
            if (recipe, seed) not in done:
                found = measure(train_digits(recipe, seed), real)
                append(path, {"recipe": recipe, "seed": seed, "steps": STEPS, **found})


def objective_of(recipe: str) -> ld.DiffusionObjective:
    """The recipe's objective; fresh samples have no reference set, so that stable targets take the batch."""
    import_all_components()
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--objective", type=ld.DiffusionObjective)
    model = jsonargparse.Namespace(yaml_of(recipe)["model"])
    objective: ld.DiffusionObjective = parser.instantiate(
        parser.parse_object({"objective": model["objective"]})
    ).objective
    if objective.stable_target is not None:
        objective.stable_target = ld.StableTarget()
    return objective


def yaml_of(recipe: str) -> dict[str, Any]:
    text = (CONFIGS / "recipes" / f"{recipe}.yaml").read_text()
    parsed: dict[str, Any] = yaml.safe_load(text)
    return parsed


def run_mixtures(path: Path, only: list[str], seeds: list[int]) -> None:
    done = {(row["recipe"], int(row["dimensions"]), int(row["seed"])) for row in rows(path)}
    for seed in seeds:
        for dimensions in BOUNDS:
            for recipe in only:
                if (recipe, dimensions, seed) not in done:
                    append(path, mixture_row(recipe, dimensions, seed))


def mixture_row(recipe: str, dimensions: int, seed: int) -> dict[str, Any]:
    seed_everything(seed, verbose=False)
    mixture = mixture_of(dimensions)
    module = train(mixture, MIXTURE_STEPS, 128, 5e-3, objective_of(recipe)).eval()
    found = excess(module, mixture)
    ratios = {
        f"{level:g}": r
        for level, r in zip(LOG_SNR.tolist(), (found.trained / found.exact - 1).tolist(), strict=True)
    }
    return {"recipe": recipe, "dimensions": dimensions, "seed": seed, "excess": found.total - 1, **ratios}


class Steps:
    """Training steps of one recipe on one batch of digits."""

    def __init__(self, recipe: str, batch: dict[str, Tensor], data: Any) -> None:
        self.objective = objective_of(recipe)
        torch.manual_seed(0)
        self.network = ld.UNet((1, 8, 8), 24, num_blocks=1, attention_levels=(), num_classes=10)
        self.optimizer = torch.optim.AdamW(
            [*self.network.parameters(), *self.objective.parameters()], lr=1e-3, fused=True
        )
        scale = self.objective.sigma_data / data.images.std()
        self.x0, self.label = batch["image"] * scale, batch["label"]
        if self.objective.stable_target is not None:
            self.objective.stable_target = ld.StableTarget(reference_size=2000)
            self.objective.stable_target.remember([(data.images * scale, data.labels)])

    def time(self, number: int) -> float:
        start = time.perf_counter()
        key = ld.RandomKey(0, batch=number)
        self.objective.loss(self.network, self.x0, {"label": self.label}, key).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def run_time(path: Path, only: list[str], rounds: int = 40) -> None:
    data = DigitsDataModule().training_data()
    batch = data.__getitems__(range(64))
    steps = {recipe: Steps(recipe, batch, data) for recipe in dict.fromkeys(["edm", *only])}
    times = np.array([[step.time(number) for step in steps.values()] for number in range(rounds + 5)])[5:]
    for recipe, ratios in zip(steps, (times / times[:, :1]).T, strict=True):
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        append(
            path, {"recipe": recipe, "time over edm": middle, "lower quartile": low, "upper quartile": high}
        )


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        )
    print(
        {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()},
        flush=True,
    )


def column(found: list[dict[str, str]], name: str, **where: str) -> list[float]:
    """One figure of all rows in which the other columns are as given."""
    return [float(row[name]) for row in found if all(row[key] == value for key, value in where.items())]


def mean_and_spread(values: list[float], digits: int) -> str:
    """Mean, and half the range over seeds."""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}" if values else ""


def sampler_alone(recipe: str, real: Reference) -> float:
    """The Frechet distance that the sampler has with the exact denoiser of Gaussian data of the digits' moments."""
    objective = objective_of(recipe)
    deviation = torch.linalg.svdvals(real.features - real.mean) / len(real.features) ** 0.5
    scale = objective.sigma_data / real.features.std()
    std = (deviation * scale).clamp(min=1e-6)

    def denoise(x_t: Tensor, level: ld.NoiseLevel) -> Tensor:
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        return alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x_t

    drawn = ld.Heun()(denoise, torch.ones(1, len(std), dtype=torch.float64), objective.schedule)[0]
    distance = ((drawn.abs() - std) / scale)[:COMPONENTS].square().sum()
    return distance.item() / real.fresh_distance(len(real.features))


def bin_cells(recipe: str, own: list[dict[str, str]], bins: list[str]) -> list[str]:
    """Loss per bin; in brackets where the recipe's schedule does not reach. Whitened latents are another space."""
    if recipe == "latent_diffusion":
        return [""] * len(bins)
    objective = objective_of(recipe)
    ends = objective.schedule.log_snr(torch.tensor([1.0, 0.0], dtype=torch.float64))
    low, high = (ends + 2 * math.log(objective.sigma_data)).tolist()
    reached = [start >= low - 0.5 and end <= high + 0.5 for start, end in itertools.pairwise(BIN_EDGES)]
    losses = [f"{np.mean(column(own, name)):.3f}" for name in bins]
    return [loss if inside else f"({loss})" for loss, inside in zip(losses, reached, strict=True)]


def table(folder: Path) -> Iterator[str]:
    """Markdown, best Frechet distance first."""
    found, mixtures = rows(folder / "recipes_digits.csv"), rows(folder / "recipes_mixtures.csv")
    times = {row["recipe"]: float(row["time over edm"]) for row in rows(folder / "recipes_time.csv")}
    bins = [name for name in found[0] if name.startswith("loss")]
    own = {name: [row for row in found if row["recipe"] == name] for name in {row["recipe"] for row in found}}
    real = reference()
    yield "| recipe | Frechet | sampler alone | accuracy | excess 2-D | excess 64-D | time |"
    yield "|" + "---|" * 7
    order = sorted(own, key=lambda name: np.mean(column(own[name], "frechet")))
    for recipe in order:
        latent = recipe == "latent_diffusion"
        cells = [mean_and_spread(column(own[recipe], "frechet"), 2)]
        cells.append("" if latent else f"{sampler_alone(recipe, real):.2f}")
        cells.append(mean_and_spread(column(own[recipe], "accuracy"), 3))
        for dimensions in ("2", "64"):
            cells.append(mean_and_spread(column(mixtures, "excess", recipe=recipe, dimensions=dimensions), 4))
        yield f"| {recipe} | " + " | ".join(cells) + f" | {'' if latent else f'{times[recipe]:.2f}'} |"
    yield ""
    yield "| loss in bins of log-SNR | " + " | ".join(name.removeprefix("loss ") for name in bins) + " |"
    yield "|" + "---|" * (1 + len(bins))
    for recipe in order:
        yield f"| {recipe} | " + " | ".join(bin_cells(recipe, own[recipe], bins)) + " |"


def reference() -> Reference:
    images, labels, held_out = load_digits(DigitsDataModule().held_out)
    return Reference(grey_levels(images), labels, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["digits", "mixtures", "time", "table"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--only", nargs="*", default=RECIPES, choices=RECIPES)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    if given.what == "digits":
        run_digits(given.path, given.only, given.seeds)
    elif given.what == "mixtures":
        run_mixtures(given.path, given.only, given.seeds)
    elif given.what == "time":
        run_time(given.path, given.only)
    else:
        print("\n".join(table(given.path)))


if __name__ == "__main__":
    main()
