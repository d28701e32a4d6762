"""Audit which operators of a training run in which number format."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_diffusion.analysis.magnitude_chart import magnitude_chart
from lightning_diffusion.analysis.operator_recorder import Phase
from lightning_diffusion.analysis.precision_audit import Audit
from lightning_diffusion.analysis.precision_report import PrecisionReport
from lightning_diffusion.callbacks.gradient_callback import scaler_of
from lightning_diffusion.drawing import Drawing
from lightning_diffusion.guidance import ClassifierFree
from lightning_diffusion.io import write_atomically
from lightning_diffusion.sampling import Euler


class PrecisionAudit(Callback):
    """Hold what the first training steps compute in against a table of what should be float32.

    When:   once for every new network or precision; `lightning-diffusion doctor --only precision` does it beforehand.
    Costs:  its first steps take many times as long, and wait for the device at every operator; nothing afterwards.
    Knobs:  steps.
    With:   any LightningModule and precision; torch.compile rests meanwhile. Process 0 tells what it saw.
    Logs:   a warning for each finding; `report`; precision_audit.json and .png in the run folder.

    Args:
        steps: optimizer steps to watch, two at least, as layers that start at zero pass on nothing before.
        write: whether to write the two files.
    """

    def __init__(self, steps: int = 3, write: bool = True) -> None:
        if steps < 1:
            raise ValueError(
                f"Found steps={steps}; expected at least 1. To audit nothing, leave PrecisionAudit out."
            )
        self.steps, self.write = steps, write
        self.report: PrecisionReport | None = None
        self._audit: Audit | None = None
        self._watching = ExitStack()
        self._until = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report, self._until = None, trainer.global_step + self.steps
        self._audit = Audit(pl_module, str(trainer.precision_plugin.precision))  # sharded, all have to look

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._audit is not None:
            self._audit.recorder.phase = Phase.FORWARD
            self._watching.enter_context(torch.compiler.set_stance("force_eager"))
            self._watching.enter_context(self._audit.recorder)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._audit is not None:
            self._audit.note_loss(loss, scaled=scaler_of(trainer) is not None)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._audit is not None:
            self._audit.recorder.phase = Phase.GRADIENTS

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._watching.close()
        if self._audit is not None:
            self._audit.next_step(trainer.optimizers)
            if trainer.global_step >= self._until:
                self._finish(trainer, pl_module, self._audit)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._audit is not None:
            self._finish(trainer, pl_module, self._audit)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._watching.close()
        self._audit = None

    def _finish(self, trainer: Trainer, module: LightningModule, audit: Audit) -> None:
        if isinstance(module, Drawing):
            audit.recorder.phase = Phase.SAMPLING
            with audit.recorder, trainer.precision_plugin.forward_context():
                _sample(module)
        self._audit, self.report = None, audit.report(trainer.global_step - self._until + self.steps)
        if not trainer.is_global_zero:
            return
        for finding in self.report.findings:
            remedy = f" Write: {finding.remedy}" if finding.remedy else ""
            rank_zero_warn(f"{finding.title} Found in {finding.evidence}.{remedy}")
        folder = trainer.loggers[0].log_dir if trainer.loggers else None
        if self.write:
            _write(self.report, Path(folder or trainer.default_root_dir))


def _sample(module: Drawing) -> None:
    guidance = ClassifierFree() if module.num_classes else None
    module.sample(2, sampler=Euler(1), guidance=guidance)


def _write(report: PrecisionReport, folder: Path) -> None:
    write_atomically(folder / "precision_audit.json", lambda file: file.write(report.to_json().encode()))
    chart = magnitude_chart(report)
    write_atomically(folder / "precision_audit.png", lambda file: chart.savefig(file, format="png"))
