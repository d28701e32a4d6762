"""Pictures of what the model draws, during training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_diffusion.batches import LABEL
from lightning_diffusion.callbacks.held_out import held_out_loaders
from lightning_diffusion.callbacks.pictures import show
from lightning_diffusion.contexts import first_conditions, refuse_context, takes_context
from lightning_diffusion.drawing import Drawing
from lightning_diffusion.guidance import Guidance
from lightning_diffusion.plots import image_grid
from lightning_diffusion.sharing import share_of

_WITHOUT_CONTEXT = (
    "Give the run validation data whose batches have one, which pictures then show, or leave SampleGrid out."
)


class SampleGrid(Callback):
    """Draw a grid of samples every so many steps and at the end of fit, always from the same noise.

    When:   always: nothing shows sooner what a model has learned.
    Costs:  one call of the sampler for rows x columns images each time; none of training's random numbers.
    Knobs:  every_n_steps, so that sampling stays a small share of the time.
    With:   EMA or PowerFunctionEMA: the averaged weights draw.
    Logs:   `samples`, to every logger that takes images; samples/step=000500.png in the run folder.

    Args:
        every_n_steps: optimizer steps between pictures.
        rows, columns: a conditional model draws a row for each of its first `rows` classes, or for each of the first
            `rows` contexts held out, with the labels that these come with.
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
        self._condition: dict[str, Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not callable(getattr(pl_module, "sample", None)):
            raise TypeError(
                f"SampleGrid needs a module that samples, {type(pl_module).__name__} has no method `sample`. "
                "Use DiffusionModule, or write sample(num_samples, condition, *, weights, seed) -> images."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_at = trainer.global_step
        if takes_context(pl_module):
            self._condition = self._contexts(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step != self._drawn_at and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._drawn_at:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_at = trainer.global_step
        images = self._sample(trainer, pl_module)
        if trainer.is_global_zero:
            self._show(trainer, images)

    def _sample(self, trainer: Trainer, pl_module: Any) -> Tensor:
        """By all processes together, where the module can; of others each draws everything."""
        weights = self.weights or ("ema" if getattr(pl_module, "averages", None) else "online")
        condition = self._condition or self._classes(pl_module)
        number = len(next(iter(condition.values()))) if condition else self.rows * self.columns
        with torch.random.fork_rng([pl_module.device] if pl_module.device.type == "cuda" else []):
            options: dict[str, Any] = {} if self.guidance is None else {"guidance": self.guidance}
            options |= {"share": share_of(trainer)} if isinstance(pl_module, Drawing) else {}
            images: Tensor = pl_module.sample(number, condition, weights=weights, seed=self.seed, **options)
        return images

    def _classes(self, pl_module: Any) -> dict[str, Tensor] | None:
        """A row for each."""
        classes = getattr(pl_module, "num_classes", 0)
        return (
            {LABEL: torch.arange(min(self.rows, classes)).repeat_interleave(self.columns)}
            if classes
            else None
        )

    def _contexts(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Held-out ones, which are the same however far training is; a row for each."""
        with torch.random.fork_rng([]):
            found = first_conditions(held_out_loaders(trainer), pl_module, self.rows)
        if not found:
            refuse_context(pl_module, "SampleGrid", _WITHOUT_CONTEXT)
        return {name: value.repeat_interleave(self.columns, 0) for name, value in found.items()}

    def _show(self, trainer: Trainer, images: Tensor) -> None:
        if images.isnan().any():
            rank_zero_warn(f"Samples at step {trainer.global_step} hold NaN: no picture is drawn.")
            return
        show(trainer, image_grid(images, self.columns, self.scale), "samples")
