"""How far a run is: loss, images per second, time left."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.data import extract_batch_size
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class TrainingProgress(ProgressBar):
    """A bar in a terminal, a line now and then elsewhere; on standard error.

    When:   always; the command line uses it.
    Costs:  reads the loss from the device when it shows something, no more often.
    Knobs:  seconds between two looks, in a terminal and elsewhere.
    With:   what modules log with `prog_bar=True`.

    Args:
        bar_seconds: between two looks at the bar.
        line_seconds: between two lines where there is no terminal.
    """

    def __init__(self, bar_seconds: float = 0.5, line_seconds: float = 10.0) -> None:
        super().__init__()
        self._console = Console(file=sys.stderr)
        self._seconds = bar_seconds if self._console.is_terminal else line_seconds
        self._enabled = True
        self._bar: Progress | None = None
        self._total: float = math.inf
        self._done_before = self._done = self._shown_done = self._images = 0
        self._began = self._shown = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        self._console.print(*args, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._images += (extract_batch_size(batch) if self._enabled else 0) * trainer.world_size
        self._advance(trainer, "step", trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, "step")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(trainer, trainer.num_val_batches)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._advance_evaluation(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(trainer, trainer.num_test_batches)

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._advance_evaluation(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(trainer, trainer.num_predict_batches)

    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._advance_evaluation(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer, "step")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end(trainer, "batch")

    def _begin_evaluation(self, trainer: Trainer, batches: list[int | float] | int | float) -> None:
        if trainer.state.fn != "fit":
            self._begin(sum(batches) if isinstance(batches, list) else batches, 0)

    def _advance_evaluation(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit":
            self._advance(trainer, "batch", self._done + 1)

    def _begin(self, total: float, done: int) -> None:
        self._total, self._images = total, 0
        self._done_before = self._done = self._shown_done = done
        self._began = self._shown = time.monotonic()

    def _advance(self, trainer: Trainer, unit: str, done: int) -> None:
        self._done = done
        if self._enabled and time.monotonic() - self._shown >= self._seconds:
            self._show(trainer, unit)

    def _end(self, trainer: Trainer, unit: str) -> None:
        if self._enabled and self._done > self._shown_done:
            self._show(trainer, unit)
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _show(self, trainer: Trainer, unit: str) -> None:
        self._shown, self._shown_done = time.monotonic(), self._done
        text = self._text(trainer, unit)
        if not self._console.is_terminal:
            self._console.print(text, highlight=False, soft_wrap=True)
            return
        bar = self._bar or self._new_bar()
        bar.update(bar.task_ids[0], description=text, completed=self._done)
        bar.refresh()

    def _new_bar(self) -> Progress:
        self._bar = Progress(
            BarColumn(20), TextColumn("{task.description}"), console=self._console, auto_refresh=False
        )
        self._bar.add_task("", total=None if math.isinf(self._total) else self._total)
        self._bar.start()
        return self._bar

    def _text(self, trainer: Trainer, unit: str) -> str:
        passed = max(self._shown - self._began, 1e-9)
        of = "" if math.isinf(self._total) else f"/{self._total:,.0f}"
        parts = [f"{unit} {self._done:,}{of}"]
        parts += [f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items()]
        parts += [f"{self._images / passed:,.0f} images/s"] if self._images else []
        return "  ".join([*parts, *self._left(passed)])

    def _left(self, passed: float) -> list[str]:
        rate = (self._done - self._done_before) / passed
        if math.isinf(self._total) or rate <= 0 or self._done >= self._total:
            return []
        return [f"{timedelta(seconds=round((self._total - self._done) / rate))} left"]
