"""What is known of noise levels in one window of a training, and over all of it.

Sums over the samples of a bin, by column:

    LOSS, SQUARE, COUNT    of losses, of their squares, of samples
    GRADIENTS, ENERGY      of samples with a gradient g, of |g|^2
    PAIRED, PAIRS          of <g_i, g_j> over pairs i != j, of such pairs
    KNOWN, KNOWN + 1, ...  of the references
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOSS, SQUARE, COUNT, GRADIENTS, ENERGY, PAIRED, PAIRS, KNOWN = range(8)


class LevelRecord(NamedTuple):
    """Sums over one window of training, float64 on the host, (bins, 7 + references), and what follows from them.

    Every property has shape (bins,), NaN in bins where there are too few samples.
    """

    sums: Tensor

    @property
    def counts(self) -> Tensor:
        """Samples."""
        return self.sums[:, COUNT]

    @property
    def draws(self) -> int:
        """Samples in all bins."""
        return int(self.sums[:, COUNT].sum())

    @property
    def share(self) -> Tensor:
        """Of all draws."""
        return self.sums[:, COUNT] / self.sums[:, COUNT].sum()

    @property
    def loss(self) -> Tensor:
        """Mean weighted loss."""
        return self.sums[:, LOSS] / self.sums[:, COUNT]

    @property
    def loss_variance(self) -> Tensor:
        """Of single samples."""
        n = self.sums[:, COUNT]
        return ((self.sums[:, SQUARE] / n - self.loss.square()).clamp(min=0) * n / (n - 1)).where(
            n > 1, torch.nan
        )

    @property
    def gradient_norm(self) -> Tensor:
        """sqrt(E|g|^2)."""
        return (self.sums[:, ENERGY] / self.sums[:, GRADIENTS]).sqrt()

    @property
    def gradient_snr(self) -> Tensor:
        """|E g|^2 / tr Var g; below 0 by chance where there is no signal."""
        signal = self.sums[:, PAIRED] / self.sums[:, PAIRS]
        return signal / (self.gradient_norm.square() - signal)

    def over(self, reference: int) -> Tensor:
        """Mean loss over the mean of a reference at the same levels."""
        known = self.sums[:, KNOWN + reference]
        return (self.sums[:, LOSS] / known).where(known > 0, torch.nan)


class LevelHistory:
    """Records over a whole training, at most `limit`: when there are more, neighbours are added up.

    Args:
        limit: records that are kept, even.
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self.steps: list[tuple[int, int]] = []
        self.records: list[LevelRecord] = []

    def add(self, first: int, last: int, record: LevelRecord) -> None:
        """What happened after step `first` up to step `last`."""
        self.steps.append((first, last))
        self.records.append(record)
        if len(self.records) > self.limit:
            self._halve()

    def followed_by(self, first: int, last: int, record: LevelRecord) -> LevelHistory:
        """This history and one record more, if that has draws; this one stays as it is."""
        longer = LevelHistory(self.limit + 1)
        longer.steps, longer.records = [*self.steps], [*self.records]
        if record.draws:
            longer.add(first, last, record)
        return longer

    def _halve(self) -> None:
        odd = len(self.records) % 2
        pairs = range(0, len(self.records) - odd, 2)
        records = [LevelRecord(self.records[i].sums + self.records[i + 1].sums) for i in pairs]
        steps = [(self.steps[i][0], self.steps[i + 1][1]) for i in pairs]
        self.records = records + self.records[len(self.records) - odd :]
        self.steps = steps + self.steps[len(self.steps) - odd :]

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "steps": [list(ends) for ends in self.steps],
            "sums": [record.sums for record in self.records],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from plain data."""
        self.steps = [(first, last) for first, last in state["steps"]]
        self.records = [LevelRecord(sums) for sums in state["sums"]]
