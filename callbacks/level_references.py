"""What losses are compared with at each noise level: measured once from the data of a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_diffusion.analysis.attainable import exact_attainable, linear_attainable, measured_variances
from lightning_diffusion.analysis.information import GaussianMixture
from lightning_diffusion.analysis.measuring import Measured, measured_module
from lightning_diffusion.batches import LABEL
from lightning_diffusion.level_statistics import Reduce, Reference
from lightning_diffusion.module import DiffusionModule

LINEAR, FLOOR = "linear", "floor"


@dataclass(frozen=True)
class Measurements:
    """Of the data as they are trained on.

    Args:
        variances: of x_0 along orthonormal directions, (D,); None where they are not known.
        scale: x_0 = scale * image + constant; None where that is not so, or no exact denoiser is known.
    """

    variances: Tensor | None = None
    scale: float | None = None

    @property
    def names(self) -> list[str]:
        """Of the references."""
        return [name for name, known in ((LINEAR, self.variances), (FLOOR, self.scale)) if known is not None]

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"variances": self.variances, "scale": self.scale}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Measurements:
        """From plain data."""
        return cls(state["variances"], state["scale"])


def measure(trainer: Trainer, pl_module: LightningModule) -> Measurements:
    """From the training data of a DiffusionModule; of any other module nothing is known. Draws no random numbers."""
    if not isinstance(pl_module, DiffusionModule):
        return Measurements()
    seen: list[float | None] = []
    with torch.random.fork_rng([pl_module.device] if pl_module.device.type == "cuda" else []):
        stream = _watched(measured_module(pl_module, pl_module._own_train_loader(), "online", 0), seen)
        variances = measured_variances(stream, over_processes(trainer, "mean"))
    known = bool(variances.isfinite().all() and variances.sum() > 0)
    exact = _mixture(trainer) is not None and pl_module.objective.stable_target is None
    return Measurements(variances if known else None, seen[0] if exact else None)


def references(trainer: Trainer, pl_module: LightningModule, measured: Measurements) -> list[Reference]:
    """In the order of their names."""
    if not isinstance(pl_module, DiffusionModule):
        return []
    found: list[Reference] = []
    if measured.variances is not None:
        found.append(linear_attainable(pl_module.objective, measured.variances))
    mixture = _mixture(trainer)
    if measured.scale is not None and mixture is not None:
        told = LABEL in pl_module._conditions and getattr(_datamodule(trainer), "labels", False)
        labelled = 1 - pl_module.label_dropout if told else 0.0
        found.append(exact_attainable(pl_module.objective, mixture, measured.scale, labelled))
    return found


def over_processes(trainer: Trainer | None, operation: str) -> Reduce:
    """The sum or mean of a tensor over all processes."""
    if trainer is None or trainer.world_size == 1:
        return lambda x: x

    def reduce(x: Tensor) -> Tensor:
        parts = torch.view_as_real(x) if x.is_complex() else x
        total: Any = trainer.strategy.reduce(parts.to(trainer.strategy.root_device), reduce_op=operation)
        total = total.to(x.device)
        return torch.view_as_complex(total) if x.is_complex() else total

    return reduce


def _watched(stream: Iterator[Measured], scales: list[float | None]) -> Iterator[Tensor]:
    """x_0 of every batch; the scale of the first one is noted."""
    for batch in stream:
        if not scales:
            uniform = (
                batch.units is not None and float(batch.units.scale.max() - batch.units.scale.min()) < 1e-6
            )
            scales.append(float(batch.units.scale.mean()) if uniform and batch.units is not None else None)
        yield batch.x0


def _mixture(trainer: Trainer) -> GaussianMixture | None:
    mixture = getattr(_datamodule(trainer), "mixture", None)
    return mixture if isinstance(mixture, GaussianMixture) else None


def _datamodule(trainer: Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
