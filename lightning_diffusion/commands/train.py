"""fit, validate, test and predict: Lightning's command line, with a folder for every run and exact resuming."""

from __future__ import annotations

import os
import re
import shutil
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

import lightning_diffusion
from lightning_diffusion.batches import LABEL, unpack
from lightning_diffusion.callbacks import (
    LastCheckpoint,
    RankWatchdog,
    RunSummary,
    SaveOnSignal,
    TrainingProgress,
)
from lightning_diffusion.commands.classes import forget_arguments_where_classes_change
from lightning_diffusion.commands.errors import UnknownOptionError
from lightning_diffusion.commands.loggers import tell_loggers, wandb_run_of
from lightning_diffusion.commands.quiet import quiet
from lightning_diffusion.commands.resuming import changes, value_of, with_configuration_of
from lightning_diffusion.commands.writing import refuse_existing, write_images
from lightning_diffusion.io import (
    AtomicCheckpointIO,
    checkpoint_of,
    folder_of,
    keep_earlier,
    load_checkpoint,
    new_run_folder,
    refuse_other_weights,
    run_folder_of,
    write_atomically,
)
from lightning_diffusion.module import DiffusionModule
from lightning_diffusion.sharded_checkpoints import is_sharded_checkpoint, stored_state_dict

_FOLDER_OF_RUN = (
    "LIGHTNING_DIFFUSION_RUN_FOLDER"  # from the first process of a machine to those that it starts
)
_OWN = {"fit": ("resume", "name", "runs"), "predict": ("checkpoint", "out")}


def run(command: str, arguments: list[str]) -> int:
    """Run one of Lightning's four commands."""
    quiet()
    import_all_components()
    forget_arguments_where_classes_change()
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    place = value_of(arguments, "--resume") or value_of(arguments, "--checkpoint")
    if place:
        checkpoint_of(place)
    DiffusionCLI([command, *with_configuration_of(place, arguments)])
    return 0


def import_all_components() -> None:
    """Short class names in YAML are those of imported classes."""
    for name in lightning_diffusion.__all__:
        getattr(lightning_diffusion, name)
    import_module("lightning_diffusion.datamodules")


class Parser(LightningArgumentParser):
    """Refuses abbreviated options: `--trainer.max_epoch 7` is a mistake, not max_epochs."""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []


class ResolvedConfig(SaveConfigCallback):
    """Writes the whole configuration into the run folder."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        text = self.parser.dump(self.config, skip_none=False)
        path = folder_of(trainer) / "config.yaml"
        opening = f"# lightning-diffusion fit --config {path}\n"
        write_atomically(path, lambda file: file.write((opening + text).encode()))
        tell_loggers(trainer, path.parent, yaml.safe_load(text))


class DiffusionCLI(LightningCLI):
    """LightningCLI for DiffusionModule."""

    def __init__(self, arguments: list[str]) -> None:
        self.folder: Path | None = None
        self._is_new_folder = False
        self.own: dict[str, Any] = {}
        self.start_from: Path | None = None
        self._config_files = [value_of(arguments, "--config"), value_of(arguments, "-c")]
        super().__init__(
            DiffusionModule,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=ResolvedConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"enable_model_summary": False},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={
                "exit_on_error": False,
                **{c: {"exit_on_error": False} for c in self.subcommands()},
            },
            auto_configure_optimizers=False,
            args=arguments,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        own = {"ckpt_path", "weights_only"}
        return {name: skipped | own for name, skipped in LightningCLI.subcommands().items()}

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--resume", type=str | None, help="Run folder or checkpoint to go on from.")
            parser.add_argument("--name", type=str | None, help="Name of the run's folder.")
            parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        else:
            parser.add_argument("--checkpoint", type=str | None, help="Run folder or checkpoint.")
        if subcommand == "predict":
            parser.add_argument("--out", type=str, default="predictions.npz", help="Where the samples go.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            self._name_unknown_option(error, args)
            raise
        subcommand = self.config.subcommand
        for name in _OWN.get(subcommand, ("checkpoint",)):
            self.own[name] = self.config[subcommand].pop(name)

    def _name_unknown_option(self, error: ArgumentError, args: list[str]) -> None:
        unknown = re.search(r"unrecognized arguments: ([^\s=]+)|not accept option '([^']+)'", error.message)
        if unknown and args[0] in self._subcommand_parsers:
            known = [
                o for o in self._subcommand_parsers[args[0]]._option_string_actions if o.startswith("--")
            ]
            dashed = unknown[1] or f"--{unknown[2]}"
            raise UnknownOptionError(dashed, known) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.start_from = self._checked_checkpoint()
        given = self._get(self.config_init, "trainer")
        if self.subcommand != "fit" or given.fast_dev_run:
            options = {"callbacks": self._with_progress(given), "plugins": _plugins(given)}
            return super().instantiate_trainer(logger=False, **options, **kwargs)
        self.folder = self._run_folder()
        return super().instantiate_trainer(
            logger=[_csv_logger(self.folder), *_listed(given.logger, Logger)],
            callbacks=self._callbacks(given),
            plugins=_plugins(given),
            default_root_dir=str(self.folder),
            **kwargs,
        )

    def _callbacks(self, given: Any) -> list[Callback]:
        callbacks = self._with_progress(given)
        if not _has(callbacks, RankWatchdog):
            callbacks = [RankWatchdog(), *callbacks]
        if given.enable_checkpointing is False:
            return [*callbacks, RunSummary()]
        writing = [] if _has(callbacks, Checkpoint) else [LastCheckpoint()]
        stopping = [] if _has(callbacks, SaveOnSignal) else [SaveOnSignal()]
        return [*callbacks, *writing, *stopping, RunSummary()]

    def _with_progress(self, given: Any) -> list[Callback]:
        callbacks = _listed(given.callbacks, Callback)
        wanted = given.enable_progress_bar is not False and not _has(callbacks, TrainingProgress)
        return [*callbacks, TrainingProgress()] if wanted else callbacks

    def _run_folder(self) -> Path:
        if _rank() != 0:
            return Path(os.environ.get(_FOLDER_OF_RUN, self.own["runs"]))
        before = run_folder_of(self.own["resume"]) if self.own["resume"] else None
        if before is not None:
            self._keep_earlier_part(before)
        self._is_new_folder = before is None
        folder = before or new_run_folder(self._name(), self.own["runs"])
        os.environ[_FOLDER_OF_RUN] = str(folder)
        return folder

    def _name(self) -> str:
        file = next((file for file in self._config_files if file), None)
        return self.own["name"] or (Path(file).stem if file else "run")

    def _keep_earlier_part(self, folder: Path) -> None:
        before = yaml.safe_load((folder / "config.yaml").read_text())
        now = yaml.safe_load(self._parser("fit").dump(self.config.fit, skip_none=False))
        for line in changes(before, now):
            print(f"  changed  {line}", flush=True)
        for name in ("config.yaml", "metrics.csv"):
            keep_earlier(folder / name)

    def _checked_checkpoint(self) -> Path | None:
        place = self.own.get("resume") or self.own.get("checkpoint")
        if place is None and self.subcommand != "fit":
            raise ValueError(f"{self.subcommand} needs --checkpoint, a run folder or a checkpoint in one")
        if place is None:
            return None
        path = checkpoint_of(place)
        shards = is_sharded_checkpoint(path)
        saved = stored_state_dict(path) if shards else load_checkpoint(path).get("state_dict", {})
        refuse_other_weights(_network_of(saved), _network_of(self.model.state_dict()), path)
        return path

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "ckpt_path": self.start_from and str(self.start_from)}

    def predict(self, **kwargs: Any) -> None:
        """Draw samples for the conditions of the prediction data, into a file."""
        if self.trainer.world_size > 1:
            raise ValueError("predict writes one file, from one process: give --trainer.devices 1")
        refuse_existing(Path(self.own["out"]), overwrite=False)
        drawn = self.trainer.predict(**kwargs)
        print(write_images(self.own["out"], _with_labels(drawn, self.trainer.predict_dataloaders)))

    def _leave_if_stopped(self) -> None:
        """A stopped run has its checkpoint, whatever then broke, such as a worker that was stopped too."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveOnSignal) and callback.status is not None:
                sys.exit(callback.status)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with wandb_run_of(self.folder):
                super()._run_subcommand(subcommand)
        except BaseException:
            self._leave_if_stopped()
            if self._is_new_folder and self.folder and not self.trainer.global_step:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise


def _with_labels(drawn: Any, loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for images, batch in zip(drawn, loader, strict=False):  # the Trainer may limit the batches
        _, condition = unpack(batch)
        yield images, condition.get(LABEL, torch.zeros(len(images), dtype=torch.int64))


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def _network_of(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name.startswith("network.")}


def _csv_logger(folder: Path) -> CSVLogger:
    return CSVLogger(str(folder.parent), name="", version=folder.name)


def _listed(given: Any, kind: type) -> list[Any]:
    several = given if isinstance(given, (list, tuple)) else [given]
    return [one for one in several if isinstance(one, kind)]


def _has(callbacks: Sequence[Callback], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _plugins(given: Any) -> list[Any]:
    plugins = [plugin for plugin in _listed(given.plugins, object) if plugin is not None]
    shards = isinstance(given.strategy, FSDPStrategy) or "fsdp" in str(given.strategy)
    writes = any(isinstance(plugin, CheckpointIO) for plugin in plugins)
    return plugins if shards or writes else [*plugins, AtomicCheckpointIO()]
