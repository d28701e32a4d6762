"""Where pictures go: into the run folder, and to every logger that takes images."""

from __future__ import annotations

from functools import partial

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from PIL import Image

from lightning_diffusion.io import folder_of, write_atomically


def show(trainer: Trainer, picture: Image.Image, name: str) -> None:
    """Write NAME/step=000500.png in the run folder and hand the picture to the loggers, as NAME at this step.

    Call it in the first process only. Nothing is done under `fast_dev_run`.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    path = folder_of(trainer) / name / f"step={trainer.global_step:06d}.png"
    write_atomically(path, partial(picture.save, format="png"))
    for logger in trainer.loggers:
        log_picture(logger, name, pixels_of(picture), trainer.global_step)


def log_picture(logger: Logger, name: str, pixels: NDArray[np.uint8], step: int | None) -> None:
    """Give pixels, uint8 (H, W, 3), to a logger that takes images; the others pass."""
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [pixels], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, pixels, step, dataformats="HWC")


def pixels_of(picture: Image.Image) -> NDArray[np.uint8]:
    """uint8 (H, W, 3): W&B does not scale floats, and shows [0, 1] as black."""
    return np.asarray(picture.convert("RGB"))
