"""Samples as training draws them, before and after the representation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_diffusion.batches import LABEL, unpack
from lightning_diffusion.objective import at_least_float32
from lightning_diffusion.resume import RandomKey


class DrawnData(NamedTuple):
    """Samples of the first batches: x_0 (N, ...) that is trained on, and the conditions of each, (N, ...)."""

    x0: Tensor
    condition: dict[str, Tensor]

    @property
    def labels(self) -> Tensor | None:
        """Classes (N,), None where the network is told none."""
        return self.condition.get(LABEL)

    def first(self, number: int) -> DrawnData:
        """The first samples."""
        return DrawnData(self.x0[:number], {name: part[:number] for name, part in self.condition.items()})

    def to(self, device: torch.device) -> DrawnData:
        """On another device."""
        return DrawnData(self.x0.to(device), {name: part.to(device) for name, part in self.condition.items()})


@torch.no_grad()
def drawn(module: LightningModule, batches: list[Any], seed: int = 0) -> DrawnData:
    """What a DiffusionModule whose representation is measured makes of batches; nothing is dropped from conditions."""
    told: set[str] = getattr(module, "_conditions", set())
    parts, conditions = [], []
    for number, batch in enumerate(batches):
        images, condition = unpack(batch)
        parts.append(_encoded(module, at_least_float32(images), RandomKey(seed, batch=number)))
        conditions.append({name: part for name, part in condition.items() if name in told})
    joined = {name: torch.cat([c[name] for c in conditions]) for name in conditions[0]}
    return DrawnData(torch.cat(parts), joined)


def _encoded(module: LightningModule, images: Tensor, key: RandomKey) -> Tensor:
    representation: Any = getattr(module, "representation", None)
    return images if representation is None else at_least_float32(representation.draw(images, key))
