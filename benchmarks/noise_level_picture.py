"""The picture of docs/logging.md: a minute's training on the digits, seen by NoiseLevelMonitor.

    OMP_NUM_THREADS=1 python benchmarks/noise_level_picture.py docs/images/noise_levels.png [--steps 300]

The digits job's network and rate, with EDM's objective as published: without stable targets, whose loss has no floor.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_diffusion import EDM, DiffusionModule, Standardize, UNet, WarmupCosine
from lightning_diffusion.callbacks import NoiseLevelMonitor
from lightning_diffusion.datamodules import DigitsDataModule


def train(folder: str, steps: int) -> None:
    """Leaves noise_levels/step=NUMBER.png in the run folder."""
    seed_everything(1, verbose=False)
    module = DiffusionModule(
        UNet((1, 8, 8), channels=24, num_blocks=1, attention_levels=(), num_classes=10),
        EDM(),
        Standardize(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
        learning_rate=WarmupCosine(),
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        log_every_n_steps=20,
        callbacks=[NoiseLevelMonitor(low=-4.0, high=10.0, bins=14, picture_every_n_steps=steps)],
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=DigitsDataModule())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        train(folder, arguments.steps)
        (picture,) = Path(folder).rglob("noise_levels/*.png")
        arguments.out.write_bytes(picture.read_bytes())


if __name__ == "__main__":
    main()
