"""Audit a module before it is trained: a few steps of a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from torch.utils.data import DataLoader

from lightning_diffusion.analysis.precision_report import PrecisionReport
from lightning_diffusion.analysis.trainer_settings import TrainerSettings
from lightning_diffusion.callbacks.precision_audit import PrecisionAudit

_AWAKE = 0.02  # deviation


def examine_precision(
    module: LightningModule,
    data: LightningDataModule | Iterable[Any],
    precision: str | Precision = "32-true",
    steps: int = 3,
) -> PrecisionReport:
    """What a training would compute in which number format, and what of it should be float32.

    Args:
        module: left alone; its copy takes the steps, with small random weights where they are all zero, as gradients
            do not pass there at first.
        data: a datamodule, a loader, or a list of batches.
        precision: one of Lightning's, or a plugin such as DiffusionPrecision.
        steps: optimizer steps.
    """
    given: dict[str, Any] = (
        {"plugins": [precision]} if isinstance(precision, Precision) else {"precision": precision}
    )
    return audited(copy.deepcopy(module), data, TrainerSettings(given), steps)


def audited(
    module: LightningModule,
    data: LightningDataModule | Iterable[Any],
    settings: TrainerSettings,
    steps: int,
    callbacks: Sequence[Callback] = (),
) -> PrecisionReport:
    """The report of a training by these settings; the module is trained, and any zero layers wakened."""
    awaken_(module)
    audit = PrecisionAudit(steps, write=False)
    with settings.short_trainer(steps, [*callbacks, audit]) as trainer:
        trainer.fit(module, _loaded(data))
    if audit.report is None:
        raise ValueError("Found no training batch; expected at least one.")
    return audit.report


def _loaded(data: Any) -> Any:
    if not isinstance(data, (list, tuple)):
        return data
    dataset: Any = list(data)
    return DataLoader(dataset, batch_size=None)


@torch.no_grad()
def awaken_(module: nn.Module) -> None:
    """Small random numbers for trained matrices, kernels and gains that are all zero."""
    for p in module.parameters():
        if p.requires_grad and p.ndim != 1 and p.is_floating_point() and not bool(p.any()):
            nn.init.normal_(p, std=_AWAKE) if p.ndim else p.fill_(_AWAKE)
