"""Quality of the samples against training time, for the weights and for their average, on the main job.

    python benchmarks/metric_against_time.py                       # trains, some minutes; writes table and picture
    python benchmarks/metric_against_time.py --table FILE.csv      # only draws what an earlier run has written

Trains configs/digits.yaml with GenerativeMetrics for online and averaged weights. Seconds are those of training steps
alone, without drawing and measuring. Writes docs/results/metric_against_time.csv and
docs/images/metric_against_time.png. The dashed line is what as many fresh real digits would get: the mean distance of
random halves of the training part, scaled as 1/n + 1/m.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_diffusion.classifier_features import ClassifierFeatures
from lightning_diffusion.cli import main as command_line
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.generative import FIGURES, get_ready, real_features
from lightning_diffusion.metrics import frechet_distance
from lightning_diffusion.plots import PALETTE, label_right, style
from lightning_diffusion.real_images import RealImages

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {"online": "online", "ema": "averaged"}
HALVINGS = 20

Row = dict[str, Any]


class Clock(Callback):
    """Logs `time/training_seconds`, the sum over training steps, every so many; list it before what measures."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._seconds = self._began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._seconds += time.perf_counter() - self._began
        if trainer.global_step % self.every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics({"time/training_seconds": self._seconds}, step=trainer.global_step - 1)


def train(folder: Path, every: int, samples: int, steps: int | None) -> Path:
    """Run the main job; returns its metrics.csv."""
    added = [
        f"--trainer.callbacks+={Path(__file__).stem}.Clock", f"--trainer.callbacks.every_n_steps={every}",
        "--trainer.callbacks+=GenerativeMetrics", f"--trainer.callbacks.every_n_steps={every}",
        f"--trainer.callbacks.num_samples={samples}", f"--trainer.callbacks.weights=[{','.join(WEIGHTS)}]",
    ]  # fmt: skip
    shorter = [] if steps is None else ["--trainer.max_steps", str(steps)]
    job = ["--config", str(ROOT / "configs" / "digits.yaml"), "--runs", str(folder), "--name", "job"]
    status = command_line(["fit", *job, *added, *shorter])
    if status:
        raise SystemExit(status)
    return folder / "job-1" / "metrics.csv"


def table(metrics: Path, samples: int) -> list[Row]:
    """One row per measurement and kind of weights."""
    with open(metrics) as file:
        logged = list(csv.DictReader(file))
    seconds = {
        row["step"]: row["time/training_seconds"] for row in logged if row.get("time/training_seconds")
    }
    return [
        {
            "step": int(row["step"]) + 1,
            "seconds": float(seconds[row["step"]]),
            "weights": weights,
            "samples": samples,
            **{name: float(row[f"metrics/{name}_classifier_{samples}_{weights}"]) for name in FIGURES},
        }
        for row in logged
        for weights in WEIGHTS
        if row["step"] in seconds and row.get(f"metrics/frechet_classifier_{samples}_{weights}")
    ]


def fresh_distance(samples: int) -> float:
    """The Frechet distance to the training digits that so many fresh digits would have."""
    data = DigitsDataModule()
    real = RealImages(data.train_dataloader(), [data.val_dataloader()])
    features = real_features(get_ready(ClassifierFeatures(), real), real).training
    half, generator = len(features) // 2, torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(features), generator=generator) for _ in range(HALVINGS)]
    distances = [float(frechet_distance(features[o[:half]], features[o[half : 2 * half]])) for o in orders]
    return sum(distances) / HALVINGS * (half / samples + half / len(features)) / 2


def draw(rows: list[Row], path: Path) -> None:
    """Frechet distance of both kinds of weights over the seconds of training."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    samples, last = rows[0]["samples"], max(row["seconds"] for row in rows)
    with style():
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for colour, (weights, label) in zip(PALETTE, WEIGHTS.items(), strict=False):
            own = [(row["seconds"], row["frechet"]) for row in rows if row["weights"] == weights]
            axes.plot(*zip(*own, strict=True), "o-", color=colour, markersize=4, label=label)
        fresh = fresh_distance(samples)
        axes.plot([0, last], [fresh, fresh], "--", color="0.45", label="fresh digits")
        axes.set(yscale="log", xlim=(0, last), xlabel="seconds of training", ylabel="Frechet distance")
        axes.set_title(f"Digits, {samples:,} samples, features of a classifier of digits")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        label_right(axes, axes.lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, help="draw this and do not train")
    parser.add_argument("--every", type=int, default=100, help="steps between measurements (100)")
    parser.add_argument("--num", type=int, default=2000, help="samples (2000)")
    parser.add_argument("--steps", type=int, help="fewer than the job's, for a try")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs", help="folder with results/ and images/ (docs)"
    )
    given = parser.parse_args()
    picture = given.out / "images" / "metric_against_time.png"
    if given.table:
        with open(given.table) as file:
            rows = [
                {name: value if name == "weights" else _number(value) for name, value in row.items()}
                for row in csv.DictReader(file)
            ]
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = table(train(Path(folder), given.every, given.num, given.steps), given.num)
        results = given.out / "results" / "metric_against_time.csv"
        results.parent.mkdir(parents=True, exist_ok=True)
        with open(results, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    for row in rows:
        print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()), sep="  ")
    draw(rows, picture)
    print(picture)


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if math.isfinite(value) and value == int(value) and "." not in text else value


if __name__ == "__main__":
    main()
