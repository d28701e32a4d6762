"""Do our figures agree with those of torch-fidelity and torchmetrics on the same features?

    python benchmarks/metrics_agreement.py [--keep FOLDER]

A program that knows none of them (NumPy and scikit-learn) writes features to disk; each of the three reads them in a
process of its own. Printed are relative differences to ours; those of Frechet and kernel distance have to be below
1e-3. Precision and recall may differ by a sample or two: torch-fidelity compares distances in float32.

    mixture    1,500 and 1,500 samples of skewed, correlated features, 64 of them
    pixels     one half of scikit-learn's digits against the other, 64 pixels, of which some never change
    inception  3,000 and 3,000 samples of 2,048 features that are never negative, as an Inception network puts them out
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BOUND = 1e-3


def skewed(generator: np.random.Generator, sizes: tuple[int, int], features: int) -> tuple[Array, Array]:
    """Two sets that are not Gaussian, correlated, and apart."""
    mix = generator.standard_normal((features, features)) / features**0.5
    x, y = (generator.standard_normal((size, features)) for size in sizes)
    return x @ mix, (y + 0.3 * (y**2 - 1)) @ mix * 0.9 + 0.1


def rectified(generator: np.random.Generator, size: int, features: int) -> tuple[Array, Array]:
    """Two sets of few factors, never negative."""
    factors = generator.standard_normal((64, features)) / 8
    x, y = (
        np.maximum(
            generator.standard_normal((size, 64)) @ factors * scale
            + 0.1 * generator.standard_normal((size, features)),
            0,
        )
        for scale in (1.0, 1.2)
    )
    return x, y


def digit_halves(generator: np.random.Generator) -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    pixels = generator.permutation(load_digits().data)
    half = len(pixels) // 2
    return pixels[:half], pixels[half : 2 * half]


def write(folder: Path, sizes: tuple[int, int] = (1500, 1500), large: int = 3000) -> None:
    """Features as `NAME.npz` with the arrays real and generated."""
    generator = np.random.default_rng(0)
    several = {"mixture": skewed(generator, sizes, 64), "pixels": digit_halves(generator)}
    if large:
        several["inception"] = rectified(generator, large, 2048)
    for name, (real, generated) in several.items():
        np.savez(folder / f"{name}.npz", real=real, generated=generated)


def ours(real: Array, generated: Array) -> dict[str, float]:
    from lightning_diffusion.metrics import frechet_distance, kernel_distance, precision_recall

    quality = precision_recall(real, generated)
    found = {"frechet": frechet_distance(real, generated), "kernel": kernel_distance(real, generated)}
    return {name: float(value) for name, value in {**found, **quality._asdict()}.items()}


def torch_fidelity(real: Array, generated: Array) -> dict[str, float]:
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = torch.as_tensor(real), torch.as_tensor(generated)
    statistics = [fid_features_to_statistics(z) for z in (x, y)]
    whole = {"kid_subsets": 1, "kid_subset_size": len(x), "verbose": False}
    alike = len(x) == len(y)  # else torch-fidelity's subsets leave samples out
    found = {
        "frechet": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"],
        **(
            {"kernel": kid_features_to_metric(x, y, **whole)["kernel_inception_distance_mean"]}
            if alike
            else {}
        ),
    }
    quality = prc_features_to_metric(y, x, prc_neighborhood=3, prc_batch_size=1000, verbose=False)
    return {**found, "precision": float(quality["precision"]), "recall": float(quality["recall"])}


def torchmetrics(real: Array, generated: Array) -> dict[str, float]:
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Flatten(torch.nn.Module):
        num_features = real.shape[1]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    def value(metric: Any) -> Any:
        metric.set_dtype(torch.float64)
        for part, is_real in ((real, True), (generated, False)):
            metric.update(torch.as_tensor(part)[..., None, None], real=is_real)
        return metric.compute()

    found = {"frechet": float(value(FrechetInceptionDistance(Flatten())))}
    if len(real) == len(generated):
        found["kernel"] = float(
            value(KernelInceptionDistance(Flatten(), subsets=1, subset_size=len(real)))[0]
        )
    return found


PROGRAMS: dict[str, Callable[[Array, Array], dict[str, float]]] = {
    "ours": ours,
    "torch-fidelity": torch_fidelity,
    "torchmetrics": torchmetrics,
}


def read(program: str, folder: Path) -> dict[str, dict[str, float]]:
    """What a program makes of every file."""
    files = {path.stem: np.load(path) for path in sorted(folder.glob("*.npz"))}
    return {name: PROGRAMS[program](file["real"], file["generated"]) for name, file in files.items()}


def differences(found: dict[str, dict[str, dict[str, float]]]) -> dict[tuple[str, str, str], float]:
    """(features, figure, program) -> relative difference to ours."""
    return {
        (features, figure, program): _relative(value, found["ours"][features][figure])
        for program, of in found.items()
        if program != "ours"
        for features, figures in of.items()
        for figure, value in figures.items()
    }


def largest(different: dict[tuple[str, str, str], float]) -> float:
    """Of the Frechet and the kernel distance."""
    return max(value for (_, figure, _), value in different.items() if figure in ("frechet", "kernel"))


def _relative(value: float, own: float) -> float:
    return abs(value - own) / max(abs(value), abs(own)) if value != own else 0.0


def _in_process(program: str, folder: str) -> dict[str, dict[str, float]]:
    line = [sys.executable, __file__, "--read", program, "--keep", folder]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    result: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(folder: str) -> None:
    subprocess.run([sys.executable, __file__, "--write", "--keep", folder], check=True)
    found = {program: _in_process(program, folder) for program in PROGRAMS}
    different = differences(found)
    print(f"{'features':<12}{'figure':<12}{'program':<16}{'its figure':>14}{'ours':>14}{'difference':>12}")
    for (features, figure, program), difference in sorted(different.items()):
        its, own = found[program][features][figure], found["ours"][features][figure]
        print(f"{features:<12}{figure:<12}{program:<16}{its:>14.8g}{own:>14.8g}{difference:>12.1e}")
    worst = largest(different)
    kept = "below" if worst < BOUND else "NOT below"
    print(f"largest relative difference of Frechet and kernel distance {worst:.1e}, {kept} {BOUND:g}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--keep", metavar="FOLDER", help="where the features are written (a temporary folder)"
    )
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--read", choices=PROGRAMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write(Path(given.keep))
    elif given.read:
        print(json.dumps(read(given.read, Path(given.keep))))
    elif given.keep:
        Path(given.keep).mkdir(parents=True, exist_ok=True)
        report(given.keep)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report(folder)


if __name__ == "__main__":
    main()
