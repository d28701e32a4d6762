"""A small DiffusionModule on the digits, for several test files."""

import lightning as L
import torch
from foreign import QUIET

import lightning_diffusion as ld
from lightning_diffusion.datamodules import DigitsDataModule


def network(num_classes=10, shape=(1, 8, 8)):
    torch.manual_seed(0)
    return ld.UNet(
        shape, channels=8, num_blocks=1, multipliers=(1,), attention_levels=(), num_classes=num_classes
    )


def module(**arguments):
    return ld.DiffusionModule(**{"network": network(), "representation": ld.Standardize(), **arguments})


def fit(model, data=None, steps=3, **arguments):
    trainer = L.Trainer(**{**QUIET, "max_steps": steps, "enable_checkpointing": False, **arguments})
    trainer.fit(model, datamodule=data or DigitsDataModule(batch_size=16))
    return trainer
