"""Where the curve of an EMA sweep goes: to the loggers of the run that was swept, under the same names everywhere.

ema_sweep.csv in the run folder, always; W&B goes on with the run whose id the folder knows, TensorBoard with the folder
of events that it knows.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from PIL import Image

from lightning_diffusion.callbacks.pictures import log_picture
from lightning_diffusion.commands.loggers import TENSORBOARD_FOLDER, WANDB_ID, wandb_run_of
from lightning_diffusion.io import write_atomically

NAME, CURVE = "ema_sweep", "ema_sweep.csv"


class Sweep(NamedTuple):
    """What a sweep found.

    Args:
        metric: with what decides about it, as in frechet_pca_2000.
        step: of the snapshot that averages were rebuilt at.
        online: the metric of the online weights.
        values: of averages by width.
    """

    metric: str
    step: int
    online: float
    values: Mapping[float, float]

    @property
    def scalars(self) -> dict[str, float]:
        """ema_sweep/METRIC/online and ema_sweep/METRIC/WIDTH."""
        named = {"online": self.online} | {f"{width:.4g}": value for width, value in self.values.items()}
        return {f"{NAME}/{self.metric}/{name}": value for name, value in named.items()}


def log_sweep(folder: Path, sweep: Sweep, picture: Path) -> None:
    """Hand a sweep of a run's folder, and its picture, to all loggers of the run; one that fails is only warned of."""
    _add_row(folder / CURVE, {"step": sweep.step, **sweep.scalars})
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    for known, tell in {TENSORBOARD_FOLDER: _tell_tensorboard, WANDB_ID: _tell_wandb}.items():
        if (folder / known).is_file():
            try:
                tell(folder, sweep, pixels)
            except Exception as error:  # of the logger's own kinds; all results are on the disk
                warnings.warn(f"the sweep is in {folder / CURVE}; a logger refused it: {error}", stacklevel=2)


def _add_row(path: Path, row: dict[str, Any]) -> None:
    """Sweeps of other widths add columns."""
    rows = list(csv.DictReader(io.StringIO(path.read_text()))) if path.is_file() else []
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for one in [*rows, row] for name in one))
    writer.writeheader()
    writer.writerows([*rows, row])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _tell_tensorboard(folder: Path, sweep: Sweep, pixels: NDArray[np.uint8]) -> None:
    events = Path((folder / TENSORBOARD_FOLDER).read_text().strip())
    if not events.is_dir():
        raise FileNotFoundError(f"{events} of {TENSORBOARD_FOLDER} is not there any more")
    logger = TensorBoardLogger(events, name="", version="", default_hp_metric=False)
    logger.log_metrics(sweep.scalars, sweep.step)
    log_picture(logger, NAME, pixels, sweep.step)
    logger.finalize("success")


def _tell_wandb(folder: Path, sweep: Sweep, pixels: NDArray[np.uint8]) -> None:
    """A table and a line of the curve as well."""
    import wandb

    with wandb_run_of(folder):
        own = {"id": (folder / WANDB_ID).read_text().strip(), "save_dir": folder.parent, "log_model": False}
        logger = WandbLogger(**{**_wandb_arguments(folder), **own})
        logger.log_metrics(sweep.scalars, sweep.step)
        table = wandb.Table(["sigma_rel", sweep.metric], [list(point) for point in sweep.values.items()])
        line = wandb.plot.line(table, "sigma_rel", sweep.metric, title=f"{NAME}/{sweep.metric}")
        logger.experiment.log({f"{NAME}/{sweep.metric}": line})
        log_picture(logger, NAME, pixels, sweep.step)


def _wandb_arguments(folder: Path) -> dict[str, Any]:
    """As the run's configuration gave them."""
    given = yaml.safe_load((folder / "config.yaml").read_text()).get("trainer", {}).get("logger")
    several = given if isinstance(given, list) else [given]
    found = [one for one in several if isinstance(one, dict) and "WandbLogger" in one.get("class_path", "")]
    return {k: v for k, v in found[0].get("init_args", {}).items() if v is not None} if found else {}
