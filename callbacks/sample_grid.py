"""Pictures of what the model draws, during training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_diffusion.callbacks.pictures import show
from lightning_diffusion.guidance import Guidance
from lightning_diffusion.plots import image_grid


class SampleGrid(Callback):
    """Draw a grid of samples every so many steps and at the end of fit, always from the same noise.

    When:   always: nothing shows sooner what a model has learned.
    Costs:  one call of the sampler for rows x columns images each time; none of training's random numbers.
    Knobs:  every_n_steps, so that sampling stays a small share of the time.
    With:   EMA or PowerFunctionEMA: the averaged weights draw.
    Logs:   `samples`, to every logger that takes images; samples/step=000500.png in the run folder.

    Args:
        every_n_steps: optimizer steps between pictures.
        rows, columns: a conditional model draws a row for each of its first `rows` classes.
        weights: `online`, `ema`, `ema:NAME` or a file; None: `ema` where there are averages, else `online`.
        seed: of the noise; equal seeds show the same noise in every picture and run.
        scale: enlargement of each image; None: small images to about 48 pixels.
        guidance: such as ClassifierFree(1.5) or AutoGuidance(CHECKPOINT); None draws without.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        rows: int = 10,
        columns: int = 10,
        weights: str | None = None,
        seed: int = 0,
        scale: int | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        for name, value in {"every_n_steps": every_n_steps, "rows": rows, "columns": columns}.items():
            if value < 1:
                raise ValueError(
                    f"{name} is {value}, expected 1 or more. To draw nothing, leave SampleGrid out."
                )
        self.every_n_steps, self.rows, self.columns = every_n_steps, rows, columns
        self.weights, self.seed, self.scale = weights, seed, scale
        self.guidance = guidance
        self._drawn_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not callable(getattr(pl_module, "sample", None)):
            raise TypeError(
                f"SampleGrid needs a module that samples, {type(pl_module).__name__} has no method `sample`. "
                "Use DiffusionModule, or write sample(num_samples, condition, *, weights, seed) -> images."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step != self._drawn_at and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._drawn_at:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_at = trainer.global_step
        images = self._sample(pl_module)
        if trainer.is_global_zero:
            self._show(trainer, images)

    def _sample(self, pl_module: Any) -> Tensor:
        weights = self.weights or ("ema" if getattr(pl_module, "averages", None) else "online")
        rows = min(self.rows, getattr(pl_module, "num_classes", 0) or self.rows)
        label = torch.arange(rows).repeat_interleave(self.columns)
        condition = {"label": label} if getattr(pl_module, "num_classes", 0) else None
        with torch.random.fork_rng([pl_module.device] if pl_module.device.type == "cuda" else []):
            guided = {} if self.guidance is None else {"guidance": self.guidance}
            images: Tensor = pl_module.sample(
                len(label), condition, weights=weights, seed=self.seed, **guided
            )
        return images

    def _show(self, trainer: Trainer, images: Tensor) -> None:
        if images.isnan().any():
            rank_zero_warn(f"Samples at step {trainer.global_step} hold NaN: no picture is drawn.")
            return
        show(trainer, image_grid(images, self.columns, self.scale), "samples")
