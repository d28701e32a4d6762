"""The work of `evaluate`."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from lightning_diffusion.autoguidance import AutoGuidance
from lightning_diffusion.averaging import full_name, resolve_weights
from lightning_diffusion.classifier_features import ClassifierFeatures
from lightning_diffusion.commands import evaluation_table as table
from lightning_diffusion.commands.classes import forget_arguments_where_classes_change
from lightning_diffusion.commands.errors import UnknownOptionError
from lightning_diffusion.commands.evaluation_table import Row
from lightning_diffusion.commands.guiding import guidance_of
from lightning_diffusion.commands.quiet import quiet
from lightning_diffusion.commands.resuming import value_of
from lightning_diffusion.commands.sample import load, parse_sampler
from lightning_diffusion.commands.train import Parser, import_all_components
from lightning_diffusion.commands.writing import refuse_existing
from lightning_diffusion.contexts import refuse_context
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
from lightning_diffusion.io import checkpoint_of, run_folder_of
from lightning_diffusion.module import DiffusionModule
from lightning_diffusion.recording import public_path


@dataclass(frozen=True)
class Comparison:
    """What samples are compared with, and how."""

    ready: ReadyExtractor
    real: RealFeatures
    labels: Tensor | None
    data_hash: str


def evaluate(own: argparse.Namespace, others: Sequence[str], own_options: Sequence[str]) -> None:
    """Measure every combination; a table on the screen and on the disk, which grows, and a picture."""
    quiet()
    out = Path(own.out or _run_folder(own.checkpoint) / "evaluation")
    refuse_existing(out, own.overwrite)
    module = load(own.checkpoint).to(own.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    refuse_context(module, "evaluate", "Measure your own samples with lightning_diffusion.metrics.")
    plan = list(_combinations(own, module))
    _refuse_diverged(module, {draws.weights or "" for draws in plan}, own.checkpoint)
    data, extractor = _data_and_extractor(own.checkpoint, others, own_options)
    compared = _comparison(module, data, extractor)
    print(_opening(own, compared, data), flush=True)
    rows, said = [], _said(own, compared, data)
    for draws in plan:
        rows.append(_measured(module, compared, draws))
        print(table.line(rows[-1]), flush=True)
        table.write(out, rows, said)
    table.draw(out / "evaluation.png", rows, f"{extractor.name}, {own.num:,} samples")
    print(f"in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _said(own: argparse.Namespace, compared: Comparison, data: LightningDataModule) -> Row:
    """What is the same for all rows."""
    checkpoint = checkpoint_of(own.checkpoint)
    values = (
        str(checkpoint),
        _step_of(checkpoint),
        own.num,
        own.seed,
        type(data).__name__,
        compared.data_hash,
        *map(len, compared.real),
        repr(compared.ready.extractor),
        f"lightning-diffusion {version('lightning-diffusion')}, torch {torch.__version__}",
    )
    return dict(zip(table.SAID, values, strict=True))


def _step_of(checkpoint: Path) -> int | None:
    """After which optimizer step it was saved; None for an exported file, which does not know."""
    if checkpoint.suffix == ".safetensors":
        return None
    saved = torch.load(checkpoint, map_location="meta", weights_only=True)
    return int(saved["global_step"])


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
    return Comparison(ready, real_features(ready, real), labels, real.content.digest)


def _measured(module: DiffusionModule, compared: Comparison, draws: Draws) -> Row:
    sampler, start = draws.sampler or module.sampler, time.perf_counter()
    with _counted(module, draws.guidance) as calls:
        drawn = drawn_features(module, draws, compared.ready, compared.labels)
    seconds, name = time.perf_counter() - start, type(sampler).__name__.lower()
    if said := diverged(drawn):
        warnings.warn(f"{name}, {draws.weights} weights: {said}", stacklevel=2)
    return {
        "weights": full_name(draws.weights or default_weights(module), module.averages),
        "sampler": name,
        "steps": sampler.num_steps,
        **_guided(draws.guidance),
        "evaluations": len(calls) // num_chunks(draws.num_samples),
        **dict.fromkeys(FIGURES, math.nan),
        **figures(compared.real, drawn),
        "seconds": round(seconds, 2),
        "sampler_settings": repr(sampler),
    }


def _guided(guidance: Any) -> Row:
    """Scale and the columns of guidance, None where there is nothing to say."""
    guide = guidance if isinstance(guidance, AutoGuidance) else None
    interval, rescale = getattr(guidance, "interval", None), getattr(guidance, "rescale", None)
    values = (
        interval and "{:g},{:g}".format(*interval),
        rescale,
        guide and str(checkpoint_of(str(guide.guide))),
        guide and guide.weights_in_use,
    )
    return {
        "guidance": getattr(guidance, "scale", 1.0),
        **dict(zip(table.GUIDANCE, values, strict=True)),
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
    return "\n".join([*lines, "", table.heading()])
