"""The work of `evaluate`."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from lightning_diffusion.averaging import resolve_weights
from lightning_diffusion.classifier_features import ClassifierFeatures
from lightning_diffusion.commands.classes import forget_arguments_where_classes_change
from lightning_diffusion.commands.errors import UnknownOptionError
from lightning_diffusion.commands.guiding import guidance_of
from lightning_diffusion.commands.quiet import quiet
from lightning_diffusion.commands.resuming import value_of
from lightning_diffusion.commands.sample import load, parse_sampler
from lightning_diffusion.commands.train import Parser, import_all_components
from lightning_diffusion.commands.writing import refuse_existing
from lightning_diffusion.features import FeatureExtractor
from lightning_diffusion.generative import (
    FIGURES,
    Draws,
    ReadyExtractor,
    RealFeatures,
    default_weights,
    diverged,
    drawn_features,
    few_samples,
    figures,
    get_ready,
    num_chunks,
    real_features,
    real_images_of,
)
from lightning_diffusion.guidance import Guidance
from lightning_diffusion.io import checkpoint_of, run_folder_of, write_atomically
from lightning_diffusion.module import DiffusionModule
from lightning_diffusion.plots import QualityPoint, quality_curves
from lightning_diffusion.recording import public_path

Row = dict[str, Any]
COLUMNS = ("weights", "sampler", "steps", "guidance", "evaluations", *FIGURES, "seconds")


@dataclass(frozen=True)
class Comparison:
    """What samples are compared with, and how."""

    ready: ReadyExtractor
    real: RealFeatures
    labels: Tensor | None


def evaluate(own: argparse.Namespace, others: Sequence[str], own_options: Sequence[str]) -> None:
    """Measure every combination; a table on the screen and on the disk, which grows, and a picture."""
    quiet()
    out = Path(own.out or _run_folder(own.checkpoint) / "evaluation")
    refuse_existing(out, own.overwrite)
    module = load(own.checkpoint).to(own.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    plan = list(_combinations(own, module))
    _refuse_diverged(module, {draws.weights or "" for draws in plan}, own.checkpoint)
    data, extractor = _data_and_extractor(own.checkpoint, others, own_options)
    compared = _comparison(module, data, extractor)
    print(_opening(own, compared, data), flush=True)
    rows: list[Row] = []
    for draws in plan:
        rows.append(_measured(module, compared, draws))
        print(_line(rows[-1]), flush=True)
        _write(
            out, rows, {"checkpoint": str(own.checkpoint), "samples": own.num, "extractor": repr(extractor)}
        )
    _draw(out / "evaluation.png", rows, f"{extractor.name}, {own.num:,} samples")
    print(f"in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _run_folder(place: str) -> Path:
    return run_folder_of(place) or checkpoint_of(place).parent


def _combinations(own: argparse.Namespace, module: DiffusionModule) -> Iterator[Draws]:
    samplers = [parse_sampler(text, module.sampler) for text in own.samplers or [""]]
    for weights in own.weights or [default_weights(module)]:
        resolve_weights(weights, module.averages)
        for sampler, scale in itertools.product(samplers, own.guidance or [1.0]):
            guidance = guidance_of(own, None if scale == 1 else scale)
            module.denoiser(None, guidance)  # refuses guidance without classes before anything is drawn
            yield Draws(own.num, weights, sampler, guidance, own.seed)


def _refuse_diverged(module: DiffusionModule, several: set[str], place: str) -> None:
    for weights in sorted(several):
        values = resolve_weights(weights, module.averages) or dict(module.named_parameters())
        broken = [name for name, value in values.items() if not bool(value.isfinite().all())]
        if broken:
            raise ValueError(
                f"{checkpoint_of(place)} has diverged: {len(broken)} of {len(values)} tensors of its {weights} weights "
                f"hold NaN or infinity, such as {broken[0]}. Evaluate an earlier checkpoint of the run"
            )


def _data_and_extractor(
    place: str, others: Sequence[str], own_options: Sequence[str]
) -> tuple[LightningDataModule, FeatureExtractor]:
    import_all_components()
    forget_arguments_where_classes_change()
    parser: LightningArgumentParser = Parser(exit_on_error=False)
    parser.add_argument("--config", type=str | None, default=None)
    parser.add_subclass_arguments(LightningDataModule, "data", required=False)
    parser.add_subclass_arguments(FeatureExtractor, "extractor", required=False)
    parser.set_defaults({"extractor": {"class_path": public_path(ClassifierFeatures)}})
    recorded = _recorded_data(_config_file(place, list(others)))
    if recorded is not None:
        parser.set_defaults({"data": recorded})
    made = parser.instantiate_classes(_parsed(parser, others, own_options))
    if made.get("data") is None:
        raise ValueError(
            f"{place} is in no run folder with a config.yaml, so its data are not known: give --data CLASS and "
            "--data.KEY VALUE, or --config FILE that has them"
        )
    return made.data, made.extractor


def _parsed(parser: LightningArgumentParser, others: Sequence[str], own_options: Sequence[str]) -> Any:
    try:
        return parser.parse_args(list(others))
    except argparse.ArgumentError as error:
        unknown = re.search(r"[Uu]nrecognized arguments: ([^\s=]+)", error.message or "")
        if unknown:
            known = [*own_options, *parser._option_string_actions]
            raise UnknownOptionError(unknown[1], known) from error
        raise


def _config_file(place: str, others: list[str]) -> Path | None:
    given = value_of(others, "--config")
    if given:
        return Path(given)
    folder = run_folder_of(place)
    return folder and folder / "config.yaml"


def _recorded_data(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    if not file.is_file():
        raise FileNotFoundError(f"--config {file} does not exist")
    recorded = (yaml.safe_load(file.read_text()) or {}).get("data")
    return {"class_path": recorded} if isinstance(recorded, str) else recorded


def _comparison(
    module: DiffusionModule, data: LightningDataModule, extractor: FeatureExtractor
) -> Comparison:
    data.prepare_data()
    data.setup("fit")
    real = real_images_of(module, data.train_dataloader(), data.val_dataloader())
    ready = get_ready(extractor, real, module.device)
    labels = real.content.labels if module.num_classes else None
    return Comparison(ready, real_features(ready, real), labels)


def _measured(module: DiffusionModule, compared: Comparison, draws: Draws) -> Row:
    sampler, start = draws.sampler or module.sampler, time.perf_counter()
    with _counted(module, draws.guidance) as calls:
        drawn = drawn_features(module, draws, compared.ready, compared.labels)
    seconds, name = time.perf_counter() - start, type(sampler).__name__.lower()
    if said := diverged(drawn):
        warnings.warn(f"{name}, {draws.weights} weights: {said}", stacklevel=2)
    return {
        "weights": draws.weights,
        "sampler": name,
        "steps": sampler.num_steps,
        "guidance": getattr(draws.guidance, "scale", 1.0),
        "evaluations": len(calls) // num_chunks(draws.num_samples),
        **dict.fromkeys(FIGURES, math.nan),
        **figures(compared.real, drawn),
        "seconds": round(seconds, 2),
    }


@contextmanager
def _counted(module: DiffusionModule, guidance: Guidance | None) -> Iterator[list[None]]:
    """A list that grows by one with every call of the network, guidance's second one included, or of the guide's."""
    calls: list[None] = []
    networks = [model.network for model in (module, getattr(guidance, "model", None)) if model is not None]
    handles = [network.register_forward_pre_hook(lambda *_: calls.append(None)) for network in networks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _opening(own: Any, compared: Comparison, data: Any) -> str:
    training, held_out = (len(part) for part in compared.real)
    lines = [
        f"{own.num} samples each, seed {own.seed}, against {training} training images of {type(data).__name__}; "
        f"{held_out} held out",
        f"features {compared.ready.extractor!r}",
    ]
    if few := few_samples(compared.real, own.num):
        lines.append(f"warning: {few}")
    return "\n".join([*lines, "", "  ".join(name.rjust(width) for name, width in _WIDTHS.items())])


_HEADS = {name: name.replace("near_copies_held_out", "held_out") for name in COLUMNS}
_WIDTHS = {head: max(len(head), 9) for head in _HEADS.values()}


def _line(row: Row) -> str:
    return "  ".join(_cell(row[name]).rjust(_WIDTHS[head]) for name, head in _HEADS.items())


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(out: Path, rows: Sequence[Row], said: dict[str, Any]) -> None:
    """After every row, so that what was measured is not lost."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    clean = [{k: None if v != v else v for k, v in row.items()} for row in rows]  # JSON has no nan
    text = json.dumps({**said, "rows": clean}, indent=1)
    for name, content in {"evaluation.csv": table.getvalue(), "evaluation.json": text}.items():
        write_atomically(out / name, lambda file, content=content: file.write(content.encode()))  # type: ignore[misc]


def _draw(path: Path, rows: Sequence[Row], title: str) -> None:
    points = [
        QualityPoint(_curve(row), row["evaluations"], row["frechet"])
        for row in rows
        if math.isfinite(row["frechet"])
    ]
    if points:
        figure = quality_curves(points, title)
        write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _curve(row: Row) -> str:
    guided = "" if row["guidance"] == 1 else f", guidance {row['guidance']:g}"
    return f"{row['sampler']}, {row['weights']}{guided}"
