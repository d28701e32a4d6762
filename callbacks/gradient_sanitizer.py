"""Numbers in place of gradients that are none."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_diffusion.callbacks.gradient_callback import (
    GradientCallback,
    log_now,
    logs_this_step,
    scaler_of,
)
from lightning_diffusion.gradients import sanitize_
from lightning_diffusion.norms import Gradients


class GradientSanitizer(GradientCallback):
    """Replace NaN and infinities in gradients before the step (Karras et al. 2022).

    When:   float32 or bfloat16, where rare elements overflow and the others are worth their step. What comes back
            in every step is a defect to look for: it hides it, and says so.
    Costs:  the norm that clipping needs as well; on the CPU more only where one is not finite.
    Knobs:  what to put in place of NaN, infinity and minus infinity.
    With:   put it before GradientClipping, whose norm would not be a number; after a guard that skips such steps.
            Under a float16 loss scaler it does nothing: the scaler skips these steps and has to see them.
    Logs:   train/sanitized_elements, since the last logging step.
    """

    def __init__(self, nan: float = 0.0, posinf: float = 1e5, neginf: float = -1e5) -> None:
        if not (all(map(math.isfinite, (nan, posinf, neginf))) and neginf <= nan <= posinf):
            raise ValueError(
                f"GradientSanitizer({nan=}, {posinf=}, {neginf=}): expected finite numbers with neginf <= nan <= "
                "posinf, such as 0.0, 1e5 and -1e5."
            )
        self.nan, self.posinf, self.neginf = nan, posinf, neginf
        self._counts: dict[int, Tensor] = {}
        self._warned = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._counts, self._warned = {}, False
        if scaler_of(trainer) is not None:
            rank_zero_info("GradientSanitizer does nothing here: the loss scaler skips steps that overflow.")

    def on_gradients(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, gradients: Gradients
    ) -> None:
        if scaler_of(trainer) is not None:
            return
        count = sanitize_(gradients, self.nan, self.posinf, self.neginf)
        self._counts[id(optimizer)] = self._counts.get(id(optimizer), torch.zeros_like(count)) + count
        if logs_this_step(trainer):
            own = self._counts.pop(id(optimizer)).float()
            changed = float(trainer.strategy.reduce(own, reduce_op="mean")) * gradients.shards
            log_now(trainer, pl_module, optimizer, {"sanitized_elements": changed})
            self._warn(changed)

    def _warn(self, changed: float) -> None:
        if changed and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{changed:.0f} elements of gradients were NaN or infinite since the last logging step and were "
                "replaced. train/sanitized_elements says whether it goes on: then look for the cause."
            )
