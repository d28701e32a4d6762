"""How well are averages rebuilt after a real training?

    python benchmarks/ema_posthoc.py train  /tmp/posthoc [--steps 1536] [--rate constant|cosine] [--seed 1]
    python benchmarks/ema_posthoc.py table  /tmp/posthoc [--json FILE]

`train` runs the digits job with six averages: 0.05 and 0.10, from which others are rebuilt, and 0.03, 0.07, 0.15
and 0.25, kept beside for comparison; all are saved 64 times. `table`, another process, rebuilds the four from files
of the two: 8, 16, 32 or 64 times, both metrics, all storages, and prints |rebuilt - average| / |average - online|.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_diffusion.posthoc import Metric, predicted_error, solve_coefficients
from lightning_diffusion.snapshots import BASE_EVERY, Place, Snapshot, combine, list_snapshots, write_snapshot

KEPT, WANTED, TIMES = (0.05, 0.10), (0.03, 0.07, 0.15, 0.25), 64
METRICS: tuple[Metric, ...] = ("white", "random_walk")


def train(folder: Path, steps: int, rate: str, seed: int) -> None:
    """The digits job, with every average saved 64 times."""
    import lightning as L

    from lightning_diffusion import EDM, DiffusionModule, Standardize, UNet, WarmupConstant, WarmupCosine
    from lightning_diffusion.callbacks import PostHocEMA
    from lightning_diffusion.datamodules import DigitsDataModule

    L.seed_everything(seed)
    network = UNet([1, 8, 8], channels=32, num_blocks=1, num_classes=10)
    module = DiffusionModule(
        network,
        EDM(),
        Standardize(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3, fused=True),
        learning_rate=WarmupConstant() if rate == "constant" else WarmupCosine(),
    )
    averages = PostHocEMA((*KEPT, *WANTED), every_n_steps=steps // TIMES, directory=str(folder))
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[averages],
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_model_summary=False,
    )
    trainer.fit(module, DigitsDataModule())
    torch.save({n: p.detach() for n, p in module.averaged_parameters().items()}, folder / "online.pt")


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Euclidean distance of all weights together."""
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in a) ** 0.5)


def stored(snapshots: Sequence[Snapshot], storage: str, folder: Path) -> list[Snapshot]:
    """The same snapshots in another storage."""
    for number, snapshot in enumerate(snapshots):
        place = Place(folder, snapshot.run, snapshot.network, storage)  # type: ignore[arg-type]
        row = number // len(KEPT)
        base = snapshots[number - len(KEPT)]
        path = place.path(base.step, base.sigma_rel) if storage == "difference" and row % BASE_EVERY else None
        write_snapshot(
            place, snapshot.step, snapshot.time, snapshot.sigma_rel, load_file(snapshot.path), path
        )
    return list_snapshots(folder)


def errors(
    snapshots: Sequence[Snapshot],
    averages: Mapping[float, Mapping[str, Tensor]],
    online: Mapping[str, Tensor],
):
    """Relative and predicted error for each metric and width."""
    times, widths = [s.time for s in snapshots], [s.sigma_rel for s in snapshots]
    for metric in METRICS:
        solved = {w: solve_coefficients(times, widths, times[-1], w, metric) for w in WANTED}
        rebuilt = combine(snapshots, torch.stack(list(solved.values()), 1))
        for (width, found), weights in zip(solved.items(), rebuilt, strict=True):
            relative = distance(weights, averages[width]) / distance(averages[width], online)
            yield metric, width, relative, predicted_error(times, widths, times[-1], width, found)


def table(folder: Path, file: Path | None) -> None:
    """Print the errors of all combinations."""
    everything = list_snapshots(folder)
    last = {s.sigma_rel: load_file(s.path) for s in everything if s.time == everything[-1].time}
    averages, online = {w: last[w] for w in WANTED}, torch.load(folder / "online.pt", weights_only=True)
    kept = [s for s in everything if s.sigma_rel in KEPT]
    steps, rows = sorted({s.step for s in kept}), []
    print(f"{len(steps)} times to step {steps[-1]}; columns: sigma_rel {WANTED}, (predicted)")
    for number in (8, 16, 32, 64):
        chosen = set(steps[len(steps) // number - 1 :: len(steps) // number])
        for storage in ("float32", "difference", "float16"):
            with tempfile.TemporaryDirectory() as other:
                snapshots = stored([s for s in kept if s.step in chosen], storage, Path(other))
                size = sum(s.path.stat().st_size for s in snapshots) / 1e6
                found = list(errors(snapshots, averages, online))
            for metric in METRICS:
                mine = [(error, guess) for m, _, error, guess in found if m == metric]
                cells = "  ".join(f"{error:.1e} ({guess:.0e})" for error, guess in mine)
                print(f"{number:3} x 2 {storage:10} {size:7.1f} MB  {metric:11}  {cells}")
            rows += [(number, storage, size, *entry) for entry in found]
    if file is not None:
        keys = ("times", "storage", "megabytes", "metric", "sigma_rel", "error", "predicted")
        file.write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["train", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1536)
    parser.add_argument("--rate", choices=["constant", "cosine"], default="cosine")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.command == "train":
        train(options.folder, options.steps, options.rate, options.seed)
    else:
        table(options.folder, options.json)


if __name__ == "__main__":
    main()
