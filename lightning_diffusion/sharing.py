"""Work on the samples of a batch, shared out among processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """This process's part of the work; `gather` stacks a tensor of all processes, (world_size, ...)."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Tensor], Tensor] = lambda x: x[None]

    def own(self, x: Tensor) -> Tensor:
        """Rows rank, rank + world_size, ... of x (N, ...); the first ones come again so that all have as many."""
        missing = -len(x) % self.world_size
        rows = torch.arange(self.rank, len(x) + missing, self.world_size)
        return x[rows.to(x.device) % len(x)]

    def join(self, rows: Tensor, total: int) -> Tensor:
        """The rows of all processes in the order before `own`, (total, ...); all of them must call this."""
        return self.gather(rows).transpose(0, 1).flatten(0, 1)[:total]


def share_of(trainer: Any) -> Share:
    """The part of a Trainer's process."""
    if trainer.world_size == 1:
        return Share()

    def gather(x: Tensor) -> Tensor:
        gathered: Tensor = trainer.strategy.all_gather(x.to(trainer.strategy.root_device))
        return gathered

    return Share(trainer.global_rank, trainer.world_size, gather)
