"""Validation data within fit, also where none is validated."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def held_out_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of held-out data, none if there are none."""
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    found = trainer.val_dataloaders
    several = found if isinstance(found, (list, tuple)) else [found]
    return [one for one in several if one is not None]
