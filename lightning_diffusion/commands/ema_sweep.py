"""ema sweep: which width is best, by what the averaged network does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diffusion.commands.ema import expected, parse_widths, refuse_file, write_weights
from lightning_diffusion.commands.parser import Parser

if TYPE_CHECKING:
    from lightning import LightningDataModule
    from torch import Tensor

    from lightning_diffusion.module import DiffusionModule
    from lightning_diffusion.reconstruction import Reconstruction

    Evaluation = Callable[[Mapping[str, Tensor] | None], float]

TOGETHER = 4
COMPONENTS = 64


def sweep(arguments: list[str]) -> None:
    """Evaluate widths, draw the curve, write the best."""
    given = _parser().parse(arguments)
    widths = parse_widths(given.sigma_rels)
    best_file = Path(given.out or Path(given.run, "ema-best.safetensors"))
    picture = best_file.with_suffix(".png")
    for file in (best_file, picture):
        refuse_file(file, given.overwrite)
    from lightning_diffusion.commands.quiet import quiet
    from lightning_diffusion.commands.sample import load
    from lightning_diffusion.commands.sweep_logging import Sweep, log_sweep

    quiet()
    evaluate = _evaluation(given, load(given.run), _datamodule(Path(given.run)))
    online = evaluate(None)
    print(f"{'online':10} {given.metric} {online:.6g}", flush=True)
    rebuilt = list(_evaluated(given, widths, evaluate, best_file))
    found = {one.sigma_rel: value for one, value in rebuilt}
    _draw(picture, found, online, given.metric)
    best = min(found, key=found.__getitem__)
    print(f"best: {best:g}, in {best_file}; curve in {picture}")
    if not given.no_loggers:
        log_sweep(Path(given.run), Sweep(_named(given), rebuilt[0][0].step, online, found), picture)


def _named(given: Any) -> str:
    """The metric with all that decides about it: figures of other numbers of samples cannot be compared."""
    return "val_loss" if given.metric == "val-loss" else f"frechet_pca_{given.num}"


def _parser() -> Parser:
    parser = Parser("ema sweep", "Evaluate averages of several widths, draw the curve, write the best.")
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder of `fit`, with PostHocEMA among its callbacks")
    add("--sigma-rels", default="0.03:0.25:12", metavar="FROM:TO:COUNT", help="or S,S,... (0.03:0.25:12)")
    add("--metric", choices=["frechet", "val-loss"], default="frechet", help="what decides (frechet)")
    add("--num", type=int, default=2000, metavar="N", help="samples per width, for frechet (2000)")
    add("--seed", type=int, default=0, metavar="N", help="of the samples' noise, the same for all widths (0)")
    add("--at-step", type=int, metavar="N", help="averages at the snapshot of this step (the last)")
    add("--out", metavar="FILE", help="the best, NAME.safetensors (RUN/ema-best.safetensors)")
    add(
        "--no-loggers",
        action="store_true",
        help="leave W&B and TensorBoard of the run alone, and ema_sweep.csv",
    )
    add("--overwrite", action="store_true", help="replace what is there")
    return parser


def _evaluated(
    given: Any, widths: Sequence[float], evaluate: Evaluation, best_file: Path
) -> Iterator[tuple[Reconstruction, float]]:
    """Average, without its weights, and metric, one after the other; what is best so far is on the disk."""
    from lightning_diffusion.reconstruction import snapshots_of

    snapshots, best = snapshots_of(given.run), float("inf")
    for rebuilt in _rebuilt(snapshots, widths, given.at_step):
        value = evaluate(rebuilt.weights)
        print(f"{rebuilt.sigma_rel:<10.4g} {given.metric} {value:<12.6g} {expected(rebuilt)}", flush=True)
        if value < best:
            best = value
            write_weights(best_file, rebuilt.weights)
        yield rebuilt._replace(weights={}), value


def _rebuilt(snapshots: Any, widths: Sequence[float], step: int | None) -> Iterator[Reconstruction]:
    """A few at a time, so that memory does not grow with their number."""
    from lightning_diffusion.reconstruction import reconstruct

    for start in range(0, len(widths), TOGETHER):
        yield from reconstruct(snapshots, widths[start : start + TOGETHER], step)


def _datamodule(run: Path) -> LightningDataModule:
    """The data that the run was trained on, as its configuration says."""
    import yaml

    file = run / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{run} has no config.yaml: a sweep needs the folder of a run made by `fit`")
    recorded = yaml.safe_load(file.read_text())["data"]
    module, _, name = recorded["class_path"].rpartition(".")
    made: LightningDataModule = getattr(import_module(module), name)(**recorded.get("init_args", {}))
    return made


def _evaluation(given: Any, module: DiffusionModule, data: LightningDataModule) -> Evaluation:
    from lightning_diffusion.contexts import refuse_context

    if given.metric == "val-loss":
        return partial(_validation_loss, module, data)
    refuse_context(module, "ema sweep", "Let --metric val-loss decide.")
    return partial(_frechet, module, *_real_features(data), given.num, given.seed)


def _validation_loss(
    module: DiffusionModule, data: LightningDataModule, weights: Mapping[str, Tensor] | None
) -> float:
    import lightning as L

    from lightning_diffusion.swapping import swapped_in

    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with swapped_in(module, weights):
        (metrics,) = trainer.validate(module, data, verbose=False)
    return float(metrics["val/loss"])


def _real_features(data: LightningDataModule) -> tuple[Tensor, Tensor]:
    """Real images flattened and projected to their first principal components; and the projection."""
    import torch

    from lightning_diffusion.batches import unpack

    data.prepare_data()
    data.setup("fit")
    images = torch.cat([unpack(batch)[0] for batch in data.train_dataloader()]).flatten(1).double()
    _, _, directions = torch.linalg.svd(images - images.mean(0), full_matrices=False)
    projection = directions[: min(COMPONENTS, len(images) // 4)].T
    return images @ projection, projection


def _frechet(
    module: DiffusionModule,
    real: Tensor,
    projection: Tensor,
    number: int,
    seed: int,
    weights: Mapping[str, Tensor] | None,
) -> float:
    import torch

    from lightning_diffusion.metrics import frechet_distance
    from lightning_diffusion.swapping import swapped_in

    label = torch.arange(number) % max(module.num_classes, 1)
    condition = {"label": label} if module.num_classes else None
    with swapped_in(module, weights):
        images = module.sample(number, condition, seed=seed)
    return float(frechet_distance(real, images.flatten(1).double().cpu() @ projection))


def _draw(path: Path, found: Mapping[float, float], online: float, metric: str) -> None:
    from lightning_diffusion.io import write_atomically
    from lightning_diffusion.plots import width_curve

    widths = sorted(found)
    figure = width_curve(widths, [found[w] for w in widths], online, metric)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
