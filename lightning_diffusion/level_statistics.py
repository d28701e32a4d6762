r"""What a training does at each noise level: sums over samples in bins of log-SNR, streamed on the device.

    l_i    weighted loss of sample i                                                      shape (B,)
    a_i    references: losses that l_i is compared with, functions of the level           shape (B,) each
    g_i    gradient of sample i's own loss with respect to the network's output for it    shape (B, M)

Of n samples in a bin, with S the sum of their gradients:

    signal  |E g|^2, without bias: (|S|^2 - sum |g_i|^2) / (n (n - 1))
    noise   tr Var g = E|g|^2 - signal

Samples whose loss or gradient is not finite are left out. Nothing waits for the device until a `LevelRecord` is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_diffusion.level_records import ENERGY, GRADIENTS, KNOWN, PAIRED, PAIRS, LevelRecord
from lightning_diffusion.noise_level import NoiseLevel, cat

Reference = Callable[[NoiseLevel], Tensor]
Reduce = Callable[[Tensor], Tensor]

_TOGETHER = 32  # micro-batches whose scalars are summed at once
_ELEMENTS = 2**22  # of all bins' summed gradients: 16 MiB


@dataclass(frozen=True)
class LevelBins:
    """Bins of equal width in log-SNR, and one open bin at either end.

    Args:
        low, high: log-SNR between which the bins lie.
        count: number of bins between them.
    """

    low: float = -10.0
    high: float = 10.0
    count: int = 20

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"Found low={self.low}, high={self.high}; expected two log-SNRs that rise.")
        if self.count < 1:
            raise ValueError(f"Found bins={self.count}; expected 1 or more.")

    def __len__(self) -> int:
        return self.count + 2

    @cached_property
    def edges(self) -> Tensor:
        """Between bins, rising, shape (count + 1,), float64."""
        return torch.linspace(self.low, self.high, self.count + 1, dtype=torch.float64)

    @cached_property
    def names(self) -> list[str]:
        """Of every bin, such as `-4_to_-3`; `below_-10` and `above_10` at the ends."""
        edges = [f"{edge:g}" for edge in self.edges.tolist()]
        between = [f"{a}_to_{b}" for a, b in pairwise(edges)]
        return [f"below_{edges[0]}", *between, f"above_{edges[-1]}"]


class LevelStatistics:
    """Sums since the last record.

    Args:
        bins: of log-SNR.
        references: losses to compare with, (B,) from levels (B,).
    """

    def __init__(self, bins: LevelBins, references: Sequence[Reference] = ()) -> None:
        self.bins, self.references = bins, list(references)
        self._edges = bins.edges
        self.clear()

    @property
    def columns(self) -> int:
        """Sums of each bin."""
        return KNOWN + len(self.references)

    def clear(self) -> None:
        """Forget everything."""
        self._pending: list[tuple[Tensor, NoiseLevel, Tensor | None]] = []
        self._sums: Tensor | None = None
        self._gradients: Tensor | None = None

    @torch.no_grad()
    def add(
        self, loss: Tensor, level: NoiseLevel, gradient: Tensor | None = None, factor: float = 1.0
    ) -> None:
        """A micro-batch: losses and levels (B,), and gradients (B, ...) that are g / factor."""
        energy = None if gradient is None else self._add_gradient(level.log_snr, gradient, factor)
        self._pending.append((loss, level, energy))
        if len(self._pending) >= _TOGETHER:
            self._fold()

    @torch.no_grad()
    def record(self, reduce: Reduce = lambda x: x) -> LevelRecord:
        """Of what was added since the last `pop`, over all processes; waits for the device.

        Args:
            reduce: the sum of a tensor over all processes; may work in place.
        """
        sums, gradients = self._reduced(reduce)
        energy, n = sums[:, ENERGY], sums[:, GRADIENTS]
        if gradients is not None:
            sums[:, PAIRED] = gradients[:-1].double().square().sum(1) - energy
            sums[:, PAIRS] = n * (n - 1)
        return LevelRecord(sums)

    def pop(self, reduce: Reduce = lambda x: x) -> LevelRecord:
        """The record, after which a new one begins."""
        record = self.record(reduce)
        self.clear()
        return record

    @torch.no_grad()
    def state_dict(self, reduce: Reduce = lambda x: x) -> dict[str, Tensor]:
        """Plain tensors on the host, of all processes together."""
        sums, gradients = self._reduced(reduce)
        return {"sums": sums} | ({} if gradients is None else {"gradients": gradients})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from plain tensors, in one of the processes."""
        self.clear()
        self._sums, self._gradients = state["sums"], state.get("gradients")

    def _reduced(self, reduce: Reduce) -> tuple[Tensor, Tensor | None]:
        self._fold()
        if self._sums is None:
            self._sums = self._zeros(torch.device("cpu"))
        sums = reduce(self._sums.clone()).double().cpu()
        gradients = None if self._gradients is None else reduce(self._gradients.clone()).cpu()
        return sums, gradients

    def _add_gradient(self, log_snr: Tensor, gradient: Tensor, factor: float) -> Tensor:
        """Sum gradients by bin; |g|^2, shape (B,). What is not finite goes to a row of its own."""
        flat, every = _thinned(gradient, _ELEMENTS // len(self.bins))
        scale = factor * math.sqrt(every)
        energy: Tensor = torch.linalg.vector_norm(flat, dim=1).mul_(scale).square_()
        row = self._index(log_snr).where(energy.isfinite(), len(self.bins))
        shape = (len(self.bins) + 1, flat.shape[1])
        if self._gradients is None or self._gradients.shape != shape:
            self._gradients = flat.new_zeros(shape)
        self._gradients = self._gradients.to(flat, non_blocking=True).index_add_(0, row, flat, alpha=scale)
        return energy

    def _index(self, log_snr: Tensor) -> Tensor:
        """In which bin, int64 (B,)."""
        self._edges = self._edges.to(log_snr, non_blocking=True)
        index: Tensor = torch.bucketize(log_snr, self._edges, right=True)
        return index

    def _fold(self) -> None:
        """Add what is pending."""
        if not self._pending:
            return
        losses, levels, energies = zip(*self._pending, strict=True)
        self._pending = []
        loss, level = torch.cat(losses), cat(list(levels))
        energy = torch.cat(
            [torch.full_like(x, torch.nan) if e is None else e for x, e in zip(losses, energies, strict=True)]
        )
        found = self._columns(loss.float(), level, energy)
        sums = (
            self._zeros(loss.device) if self._sums is None else self._sums.to(found.device, non_blocking=True)
        )
        member = self._index(level.log_snr)[:, None] == torch.arange(len(self.bins), device=loss.device)
        self._sums = sums + member.to(found).T @ found

    def _columns(self, loss: Tensor, level: NoiseLevel, energy: Tensor) -> Tensor:
        """What is summed of every sample, shape (B, 7 + references)."""
        known = [reference(level) for reference in self.references]
        usable = torch.stack([loss, *known]).isfinite().all(0)
        has_gradient, nothing = energy.isfinite(), torch.zeros_like(loss)
        columns = [loss, loss.double().square() if _doubles(loss) else loss.square(), torch.ones_like(loss)]
        parts = [x.where(usable, 0.0) for x in columns]
        parts += [has_gradient, energy.where(has_gradient, 0.0), nothing, nothing]
        parts += [x.where(usable, 0.0) for x in known]
        return torch.stack([part.to(_sum_type(loss)) for part in parts], 1)

    def _zeros(self, device: torch.device) -> Tensor:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(len(self.bins), self.columns, device=device, dtype=dtype)


def _thinned(gradient: Tensor, at_most: int) -> tuple[Tensor, int]:
    """(B, M) float32 with M at most that many elements of each sample, evenly spread; and every how many-th it is."""
    flat = gradient.detach().flatten(1)
    every = -(-flat.shape[1] // at_most)
    return flat[:, ::every].float(), every


def _doubles(x: Tensor) -> bool:
    return x.device.type != "mps"


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if _doubles(x) else torch.float32
