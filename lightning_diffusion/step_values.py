"""What a guard looks at in an optimizer step: the gradient's norm, losses by bands of log-SNR, the samples' indices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_diffusion.objective import Report

NORM, LOSS = "gradient norm", "loss"


class StepValues:
    """Collects what is known of a step's micro-batches. Nothing waits for the device.

    Args:
        edges: log-SNR between bands, increasing.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = list(edges)
        self._edges = torch.tensor(self.edges)
        self._in_bands = False
        self.forget()

    def forget(self) -> None:
        """A new step begins."""
        self._losses: list[Tensor] = []
        self._indices: list[Any] = []
        self._report: Report | None = None

    def add_batch(self, batch: Any) -> None:
        """A micro-batch; indices are what a dict holds as "index"."""
        if isinstance(batch, Mapping) and "index" in batch:
            self._indices.append(batch["index"])

    def add_loss(self, loss: Tensor) -> None:
        """The loss () on which backward is called."""
        self._losses.append(loss.detach())

    def vector(self, report: Any, norm: Tensor, factor: Tensor | float) -> Tensor:
        """Numbers whose mean over processes `named` understands.

        Args:
            report: the module's `Report`; of anything else only the mean of the losses is known.
            norm: of the gradient, ().
            factor: by which the losses on which backward was called have to be multiplied.
        """
        self._report = report if isinstance(report, Report) else None
        norm = norm.float().reshape(1)
        if self._report is not None:
            self._edges = self._edges.to(self._report.per_sample.device)
            sums = band_sums(self._report.per_sample, self._report.level.log_snr, self._edges)
            return torch.cat([norm, self._report.loss.reshape(1).to(norm), sums.flatten().to(norm)])
        losses = [(loss.float() * factor).to(norm) for loss in self._losses]
        return torch.cat([norm, torch.stack(losses).mean().reshape(1)]) if losses else norm

    def named(self, numbers: Sequence[float]) -> dict[str, float]:
        """Values by the names of their series."""
        whole, bands = dict(zip((NORM, LOSS), numbers, strict=False)), len(self.edges) + 1
        return whole | band_means(numbers[2 : 2 + bands], numbers[2 + bands :], self.edges)

    @property
    def indices(self) -> list[int]:
        """Of this process's samples, those of large losses first where these are known; waits for the device."""
        found = [int(i) for part in self._indices for i in torch.as_tensor(part).flatten()]
        if self._report is None or len(self._report.per_sample) != len(found):
            return found
        losses = self._report.per_sample.nan_to_num(nan=math.inf)
        return [found[i] for i in losses.argsort(descending=True, stable=True).tolist()]


def band_sums(per_sample: Tensor, log_snr: Tensor, edges: Tensor) -> Tensor:
    """Sums of losses (B,) and numbers of samples in every band of log-SNR, shape (2, len(edges) + 1).

    What is not finite stays in its band.
    """
    band = torch.bucketize(log_snr.to(edges), edges)
    inside = band == torch.arange(len(edges) + 1, device=edges.device)[:, None]
    sums = torch.where(inside, per_sample.float(), 0.0).sum(1)
    return torch.stack([sums, inside.sum(1).float()])


def band_means(sums: Sequence[float], counts: Sequence[float], edges: Sequence[float]) -> dict[str, float]:
    """Mean loss of every band that has samples, by its name; empty where no sums are known."""
    if not sums:
        return {}
    names = [_band_name(*ends) for ends in zip([-math.inf, *edges], [*edges, math.inf], strict=True)]
    return {name: x / n for name, x, n in zip(names, sums, counts, strict=True) if n}


def _band_name(low: float, high: float) -> str:
    return f"{LOSS} at log-SNR {low:g} to {high:g}"
