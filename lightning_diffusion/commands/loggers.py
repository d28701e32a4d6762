"""What loggers beside the run folder are told of a run: its name, configuration, environment and commit.

A resumed run goes on in the same run of W&B: its id is kept in the run folder, and handed over by the variables of the
environment that W&B reads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lightning_diffusion.environment import environment
from lightning_diffusion.io import write_atomically

ENVIRONMENT, WANDB_ID, TENSORBOARD_FOLDER = "environment.yaml", "wandb-id.txt", "tensorboard-folder.txt"
_VARIABLES = ("WANDB_NAME", "WANDB_RUN_ID", "WANDB_MODE")


def tell_loggers(trainer: Trainer, folder: Path, configuration: Mapping[str, Any]) -> None:
    """Write the environment into the run folder, and hand it with the configuration to the other loggers."""
    found = environment()
    text = yaml.safe_dump(found, sort_keys=False)
    write_atomically(folder / ENVIRONMENT, lambda file: file.write(text.encode()))
    for logger in trainer.loggers:
        if not isinstance(logger, CSVLogger):
            _tell(logger, configuration, found)
        for name, known in _known_by(logger).items():
            write_atomically(folder / name, lambda file, known=known: file.write(known.encode()))  # type: ignore[misc]


def _known_by(logger: Logger) -> dict[str, str]:
    """By which the logger's run is found again, by the name of the file that keeps it."""
    if isinstance(logger, TensorBoardLogger):
        return {TENSORBOARD_FOLDER: str(Path(logger.log_dir).resolve())}
    is_run = isinstance(logger, WandbLogger) and isinstance(logger.version, str)
    return {WANDB_ID: str(logger.version)} if is_run else {}


def _tell(logger: Logger, configuration: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("config", _as_markdown(configuration))
        logger.experiment.add_text("environment", _as_markdown(found))
    else:
        logger.log_hyperparams({"config": dict(configuration), "environment": dict(found)})


def _as_markdown(data: Mapping[str, Any]) -> str:
    return "".join(f"    {line}\n" for line in yaml.safe_dump(dict(data), sort_keys=False).splitlines())


@contextmanager
def wandb_run_of(folder: Path | None) -> Iterator[None]:
    """W&B names its run after the folder, unless a name is given, or goes on with the one that the folder knows."""
    before, is_ours = {name: os.environ.get(name) for name in _VARIABLES}, _wandb_run() is None
    if folder is not None:
        os.environ.setdefault("WANDB_NAME", folder.name)
        known = folder / WANDB_ID
        if known.is_file():
            os.environ.setdefault("WANDB_RUN_ID", known.read_text().strip())
    failed = 1
    try:
        yield
        failed = 0
    finally:
        if is_ours and (run := _wandb_run()) is not None:
            run.finish(exit_code=failed)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _wandb_run() -> Any:
    """The one that goes on in this process, if W&B is there at all."""
    return getattr(sys.modules.get("wandb"), "run", None)
