"""What training reported since the last optimizer step, and the mean loss since the last logging step."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_diffusion.noise_level import cat
from lightning_diffusion.objective import Report


class Reports:
    """Reports of micro-batches, on the device: nothing waits for it."""

    def __init__(self) -> None:
        self._since_step: list[Report] = []
        self._loss_sum: Tensor = torch.zeros(())
        self._losses = 0
        self._begin_anew = True

    def add(self, report: Report, starts_step: bool) -> None:
        """Keep the report of a micro-batch, the first of an optimizer step or a further one."""
        if starts_step:
            self._since_step.clear()
        if starts_step and self._begin_anew:
            self._losses, self._begin_anew = 0, False
        self._since_step.append(report)
        self._loss_sum = self._loss_sum + report.loss if self._losses else report.loss
        self._losses += 1

    def take_mean_loss(self) -> Tensor:
        """Mean loss () of the steps so far; the next step begins a new mean."""
        self._begin_anew = True
        return self._loss_sum / self._losses

    def joined(self) -> Report:
        """Loss (), per-sample loss and level (B,) of all micro-batches since the last optimizer step."""
        losses = torch.stack([report.loss for report in self._since_step])
        per_sample = torch.cat([report.per_sample for report in self._since_step])
        return Report(losses.mean(), per_sample, cat([report.level for report in self._since_step]))
