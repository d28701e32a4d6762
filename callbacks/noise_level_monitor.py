"""What a training does at each noise level."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_diffusion.callbacks.gradient_callback import logs_this_step, scaler_of
from lightning_diffusion.callbacks.level_references import Measurements, measure, over_processes, references
from lightning_diffusion.callbacks.noise_level_picture import noise_level_picture
from lightning_diffusion.callbacks.pictures import show
from lightning_diffusion.level_records import LevelHistory, LevelRecord
from lightning_diffusion.level_statistics import LevelBins, LevelStatistics
from lightning_diffusion.objective import Report
from lightning_diffusion.output_gradients import OutputGradients

SERIES = ("share", "loss", "loss_variance", "gradient_norm", "gradient_snr")


class NoiseLevelMonitor(Callback):
    """Log loss and gradient per log-SNR, and the loss over what is attainable; draw them over the training.

    The gradient is that of a sample's own loss with respect to the network's output for it, exactly, as backward leaves
    it there: its root mean square norm, and |mean|^2 / variance over samples, without bias (so at times below 0).
    Attainable is, for DiffusionModule, the loss of the best linear denoiser of the training data, and the least loss of
    all where the datamodule has an exact denoiser (a `mixture`). See docs/logging.md.

    When:   always while a recipe is young: it shows on which levels nothing is learned, or nothing is left to learn.
    Costs:  under 2 % of a step of 10 M parameters; nothing waits for the device between logging steps; the sums of
            gradients, at most 16 MiB; at the first start 4,096 samples are read for their variances.
    Knobs:  the bins; how often a picture is drawn.
    With:   any LightningModule with a property `report` (see `Report`); gradients where the network is its attribute
            `network`, called once in a training step. It looks and changes nothing.
    Logs:   levels/NAME/BIN of each window between logging steps, NAME one of share, loss, loss_variance,
            gradient_norm, gradient_snr, loss_over_linear, loss_over_floor; `noise_levels`, a picture, to every logger
            that takes images, and to noise_levels/step=000500.png in the run folder.

    Args:
        low, high: log-SNR between which bins lie; there is an open one at either end.
        bins: between low and high.
        picture_every_n_steps: optimizer steps between pictures; one more at the end of fit.

    Raises:
        TypeError: for a module without `report`.
    """

    def __init__(
        self, low: float = -10.0, high: float = 10.0, bins: int = 20, picture_every_n_steps: int = 500
    ) -> None:
        if picture_every_n_steps < 1:
            raise ValueError(
                f"Found picture_every_n_steps={picture_every_n_steps}; expected 1 or more optimizer steps."
            )
        self.bins, self.picture_every_n_steps = LevelBins(low, high, bins), picture_every_n_steps
        self.history = LevelHistory()
        self._statistics = LevelStatistics(self.bins)
        self._measured = Measurements()
        self._outputs = OutputGradients()
        self._restored: dict[str, Any] | None = None
        self._trainer: Trainer | None = None
        self._began = self._drawn_at = self._seen = 0

    @property
    def state_key(self) -> str:
        """The same for all arguments, so that a resumed run may change them."""
        return "NoiseLevelMonitor"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(type(pl_module), "report") and "report" not in vars(pl_module):
            raise TypeError(
                f"NoiseLevelMonitor needs a module that reports its losses by level, {type(pl_module).__name__} has no "
                "`report`. Use DiffusionModule, or give it a property `report` that returns a "
                "lightning_diffusion.objective.Report of the micro-batches since the last optimizer step."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._outputs.watch(getattr(pl_module, "network", None))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = self._drawn_at = trainer.global_step
        if self._restored is None:
            self._measured, self.history = measure(trainer, pl_module), LevelHistory()
        self._statistics = LevelStatistics(self.bins, references(trainer, pl_module, self._measured))
        if self._restored is not None:
            self._continue(trainer, self._restored)
        self._restored = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._outputs.forget()
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._seen = 0

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report = _checked(pl_module)
        new = len(report.per_sample) - self._seen
        if new > 0:
            self._seen += new
            loss, level = (
                report.per_sample[-new:],
                type(report.level)(*(part[-new:] for part in report.level)),
            )
            factor = new * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
            self._statistics.add(loss, level, self._outputs.pop(new, scaler_of(trainer)), float(factor))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        if logs_this_step(trainer):
            self._log(trainer, self._named(self._close_window(trainer)))
        if trainer.global_step % self.picture_every_n_steps == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._outputs.leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._outputs.leave()

    def state_dict(self) -> dict[str, Any]:
        """All processes have to ask for it, as they do when a checkpoint is written."""
        window = self._statistics.state_dict(over_processes(self._trainer, "sum"))
        return {
            "bins": [self.bins.low, self.bins.high, self.bins.count],
            "history": self.history.state_dict(),
            "window": {**window, "began": self._began},
            "measured": self._measured.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._measured = Measurements.from_state(state_dict["measured"])
        self._restored = state_dict

    def _continue(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Where the checkpoint was written, unless the bins are others now."""
        if state["bins"] != [self.bins.low, self.bins.high, self.bins.count]:
            return
        self.history.load_state_dict(state["history"])
        window = {name: state["window"][name] for name in ("sums", "gradients") if name in state["window"]}
        if window["sums"].shape[1] == self._statistics.columns:
            self._began = state["window"]["began"]
            keeps = trainer.is_global_zero
            self._statistics.load_state_dict(
                window if keeps else {name: torch.zeros_like(x) for name, x in window.items()}
            )

    def _close_window(self, trainer: Trainer) -> LevelRecord:
        record = self._statistics.pop(over_processes(trainer, "sum"))
        if record.draws:
            self.history.add(self._began, trainer.global_step, record)
        self._began = trainer.global_step
        return record

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        """To the loggers alone: what a module logs once is logged again in windows where it is not known."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(values, step)

    def _named(self, record: LevelRecord) -> dict[str, float]:
        """What is known, by the names of the curves."""
        series = {name: getattr(record, name) for name in SERIES}
        series |= {f"loss_over_{name}": record.over(i) for i, name in enumerate(self._measured.names)}
        return {
            f"levels/{name}/{bin_}": value
            for name, values in series.items()
            for bin_, value in zip(self.bins.names, values.tolist(), strict=True)
            if value == value and not (name == "share" and value == 0)
        }

    def _draw(self, trainer: Trainer) -> None:
        """With the window that has begun, which goes on."""
        if trainer.global_step == self._drawn_at:
            return
        self._drawn_at = trainer.global_step
        now = self._statistics.record(over_processes(trainer, "sum"))
        shown = self.history.followed_by(self._began, trainer.global_step, now)
        if trainer.is_global_zero and shown.records:
            show(trainer, noise_level_picture(shown, self.bins, self._measured.names), "noise_levels")


def _checked(pl_module: LightningModule) -> Report:
    report: Any = getattr(pl_module, "report")  # noqa: B009
    if not isinstance(report, Report):
        raise TypeError(
            f"Found {type(pl_module).__name__}.report = {type(report).__name__}; expected a "
            "lightning_diffusion.objective.Report(loss, per_sample, level)."
        )
    return report
