"""One checkpoint, always the last state of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_diffusion.io import CHECKPOINTS, LAST


class LastCheckpoint(Checkpoint):
    """Write `checkpoints/last.ckpt` every so many steps and at the end, each replacing the one before.

    When:   every run that may be stopped or goes on later.
    Costs:  one file, and the time to write it.
    Knobs:  every_n_steps, the most that a crash can lose.
    With:   AtomicCheckpointIO, else a crash while writing loses both. ModelCheckpoint for the best of several.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        dirpath: folder of the file; by default `checkpoints` in the run folder.
    """

    def __init__(self, every_n_steps: int = 500, dirpath: str | Path | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"found every_n_steps={every_n_steps}, expected 1 or more.")
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self._saved_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = self.dirpath or Path(trainer.log_dir or trainer.default_root_dir, CHECKPOINTS)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step != self._saved_at and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._saved_at = trainer.global_step
            trainer.save_checkpoint(Path(self.dirpath or CHECKPOINTS) / LAST)
