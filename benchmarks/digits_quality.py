"""How good are the digits that a checkpoint draws?

    python benchmarks/digits_quality.py runs/digits-1/checkpoints/last.ckpt [more ...] [--weights ema]
    python benchmarks/digits_quality.py --calibrate

One sample is drawn for each of the 1,797 real digits, of its class, with the checkpoint's own sampler, and
rounded to the 17 grey levels of the real ones. Then:

    accuracy     share of samples whose class a classifier trained on the real digits finds; >= 0.98
    frechet      Frechet distance to the real digits in their first 30 principal components, over what as many
                 fresh real digits would have: the mean distance of random halves, scaled by 1/n; <= 1.2
    auc          of the strongest of three classifiers that tell samples from real, shuffled folds; <= 0.60
    near_copies  share of samples closer to a training digit than the 5 % quantile of the training digits' own
                 nearest-neighbour distances, beside the same share for held-out digits; <= 0.08

`--calibrate` measures the measure. Real digits, one half as samples against the other, must get about 0.98,
1, 0.5 and 0.05; one Gaussian per class must not pass.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import Tensor

from lightning_diffusion import DiffusionModule
from lightning_diffusion.datamodules.digits import DigitsDataModule, load_digits
from lightning_diffusion.metrics import frechet_distance, near_copies

Array = NDArray[Any]
COMPONENTS = 30
HALVINGS = 40
SPLITS = 4
BOUNDS = {"accuracy": 0.98, "frechet": 1.2, "auc": 0.60, "near_copies": 0.08}
JUDGES: dict[str, Callable[[], Any]] = {
    "auc_neighbours": lambda: KNeighborsClassifier(10, weights="distance"),
    "auc_svm": lambda: SVC(C=10.0, gamma=0.002),
    "auc_trees": lambda: ExtraTreesClassifier(300, min_samples_leaf=2, random_state=0),
}


class Reference:
    """Real digits, and what is computed from them once. Features are grey levels 0..16, float64 (N, 64)."""

    def __init__(self, features: Tensor, labels: Tensor, held_out: Tensor) -> None:
        self.features, self.labels = features, labels
        self.train, self.held_out = features[~held_out], features[held_out]
        self.mean = features.mean(0)
        self.directions = torch.linalg.svd(features - self.mean, full_matrices=False).Vh[:COMPONENTS]
        self.classifier = new_classifier().fit(features, labels)

    def components(self, features: Tensor) -> Tensor:
        """First principal components, shape (N, 30)."""
        return (features - self.mean) @ self.directions.T

    def fresh_distance(self, n: int) -> float:
        """The Frechet distance that n fresh real digits would have, from random halves: it falls as 1/n."""
        x, generator = self.components(self.features), torch.Generator().manual_seed(0)
        half = len(x) // 2
        orders = [torch.randperm(len(x), generator=generator) for _ in range(HALVINGS)]
        distances = [frechet_distance(x[order[:half]], x[order[half : 2 * half]]).item() for order in orders]
        return float(np.mean(distances)) * (half / n + half / len(x)) / 2


def new_classifier() -> SVC:
    """Finds the class of 99 % of real digits that it has not seen."""
    return SVC(C=10.0, gamma=0.001)


def grey_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as grey levels 0..16, rounded, float64 (N, 64)."""
    return ((images.double() + 1) * 8).round().clamp(0, 16).flatten(1)


def auc(judge: Any, real: Tensor, samples: Tensor) -> float:
    """Area under the curve of a classifier that tells samples from real digits, over shuffled folds."""
    x, y = np.concatenate([real, samples]), np.repeat([0, 1], [len(real), len(samples)])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    method = "decision_function" if isinstance(judge, SVC) else "predict_proba"
    score = cross_val_predict(judge, x, y, cv=folds, method=method)
    return float(roc_auc_score(y, score if score.ndim == 1 else score[:, 1]))


def measure(real: Reference, samples: Tensor, labels: Tensor) -> dict[str, float]:
    """All figures of samples (N, 64) that were drawn for labels (N,)."""
    distance = frechet_distance(real.components(real.features), real.components(samples)).item()
    judged = {name: auc(judge(), real.features, samples) for name, judge in JUDGES.items()}
    return {
        "accuracy": float((real.classifier.predict(samples) == labels.numpy()).mean()),
        "frechet": distance / real.fresh_distance(len(samples)),
        "auc": max(judged.values()),
        **judged,
        "near_copies": near_copies(samples, real.train).item(),
        "held_out": near_copies(real.held_out, real.train).item(),
    }


def draw(checkpoint: str, labels: Tensor, weights: str) -> tuple[Tensor, float]:
    """One sample for each label, and the seconds that it took."""
    module = DiffusionModule.load_from_checkpoint(checkpoint, map_location="cpu")
    if module.image_shape != (1, 8, 8):
        raise SystemExit(f"{checkpoint} draws images of {module.image_shape}; expected digits of (1, 8, 8).")
    start = time.perf_counter()
    return module.sample(len(labels), {"label": labels}, weights=weights), time.perf_counter() - start


def gaussian_per_class(real: Reference) -> Tensor:
    """The baseline: for each real digit a draw from a Gaussian with the moments of its class."""
    generator = np.random.default_rng(0)
    samples = torch.empty_like(real.features)
    for digit in range(10):
        own = real.features[real.labels == digit].numpy()
        drawn = generator.multivariate_normal(own.mean(0), np.cov(own.T), len(own))
        samples[real.labels == digit] = torch.from_numpy(drawn)
    return samples.round().clamp(0, 16)


def half_against_half(features: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """The figures of one random half of the real digits as samples, the other being all that is known."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    known, fresh = order.chunk(2)
    real = Reference(features[known], labels[known], torch.zeros(len(known), dtype=torch.bool))
    real.held_out = features[fresh]
    return measure(real, features[fresh], labels[fresh])


def calibrate(real: Reference) -> dict[str, dict[str, float]]:
    """What real digits and one Gaussian per class get."""
    halves = [half_against_half(real.features, real.labels, seed) for seed in range(SPLITS)]
    mean = {name: float(np.mean([half[name] for half in halves])) for name in halves[0]}
    return {
        "real digits": mean,
        "one Gaussian per class": measure(real, gaussian_per_class(real), real.labels),
    }


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """One row per set of samples."""
    names = list(next(iter(rows.values())))
    width = max(map(len, rows))
    print(" " * width, *(f"{name:>{max(len(name), 7)}}" for name in names))
    for title, row in rows.items():
        print(f"{title:<{width}}", *(f"{row[name]:{max(len(name), 7)}.3f}" for name in names))


def worst(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """The worst of each figure over the checkpoints."""
    names = next(iter(rows.values()))
    return {name: (min if name == "accuracy" else max)(row[name] for row in rows.values()) for name in names}


def passes(row: dict[str, float]) -> bool:
    """Whether all figures keep their bounds."""
    return row["accuracy"] >= BOUNDS["accuracy"] and all(
        row[name] <= bound for name, bound in BOUNDS.items() if name != "accuracy"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", help="files written by lightning-diffusion fit")
    parser.add_argument("--weights", default="ema", help="online, ema, ema:NAME or FILE.safetensors")
    parser.add_argument("--calibrate", action="store_true", help="measure real digits and a baseline")
    arguments = parser.parse_args()
    if not arguments.checkpoints and not arguments.calibrate:
        parser.error("give checkpoints, or --calibrate")
    images, labels, held_out = load_digits(DigitsDataModule().held_out)
    real = Reference(grey_levels(images), labels, held_out)
    rows = calibrate(real) if arguments.calibrate else {}
    drawn = {}
    for checkpoint in arguments.checkpoints:
        samples, seconds = draw(checkpoint, labels, arguments.weights)
        print(f"{checkpoint} ({arguments.weights}): {len(samples)} samples in {seconds:.1f} s")
        drawn[checkpoint] = measure(real, grey_levels(samples), labels)
    print_table({**rows, **drawn, **({"worst": worst(drawn)} if len(drawn) > 1 else {})})
    if drawn:
        print("bounds", BOUNDS, "kept" if passes(worst(drawn)) else "broken")
    print(json.dumps({**rows, **drawn}))


if __name__ == "__main__":
    main()
