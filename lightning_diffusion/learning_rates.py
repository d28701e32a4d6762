"""Learning rates as factors of the optimizer's own, over optimizer steps.

Lengths may be given in steps or in images; both add up. Total steps are unknown while a configuration is read, so
a learning rate is a function of (step, total_steps, images_per_step).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class LearningRate(ABC):
    """A linear warm-up, then what the subclass says.

    Attributes:
        warmup_steps, warmup_images: length of the warm-up, added up.
    """

    warmup_steps: int
    warmup_images: int

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.warmup_images < 0:
            raise ValueError(f"Found {self}; expected a warm-up of at least 0 steps and 0 images.")

    @abstractmethod
    def after_warmup(self, step: int, progress: float) -> float:
        """The factor at a step; `progress` goes from 0 at the end of the warm-up to 1 at the end of training."""

    def __call__(self, step: int, total_steps: float, images_per_step: int) -> float:
        """The factor of optimizer step number `step`, counted from 0, of `total_steps` (may be infinite)."""
        warmup = self.warmup_steps + self.warmup_images / images_per_step
        progress = (step - warmup) / max(total_steps - warmup, 1) if math.isfinite(total_steps) else 0.0
        ramp = min((step + 1) / (warmup + 1), 1.0)
        return ramp * self.after_warmup(step, min(max(progress, 0.0), 1.0))


@dataclass(frozen=True)
class WarmupConstant(LearningRate):
    """Constant after the warm-up."""

    warmup_steps: int = 100
    warmup_images: int = 0

    def after_warmup(self, step: int, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class WarmupLinear(LearningRate):
    """Linear to zero after the warm-up."""

    warmup_steps: int = 100
    warmup_images: int = 0

    def after_warmup(self, step: int, progress: float) -> float:
        return 1 - progress


@dataclass(frozen=True)
class WarmupCosine(LearningRate):
    """Half a cosine to zero after the warm-up."""

    warmup_steps: int = 100
    warmup_images: int = 0

    def after_warmup(self, step: int, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class WarmupInverseSquareRoot(LearningRate):
    """1 / sqrt(max(step / reference_steps, 1)) (Karras et al. 2024, "EDM2", eq. 67).

    Args:
        warmup_steps, warmup_images: length of the warm-up, added up.
        reference_steps: where the decay sets in.
    """

    warmup_steps: int = 0
    warmup_images: int = 10_000_000
    reference_steps: int = 70_000

    def after_warmup(self, step: int, progress: float) -> float:
        return 1 / math.sqrt(max(step / self.reference_steps, 1))


class TakenStepsLR(LambdaLR):
    """LambdaLR that counts only steps that the optimizer took: not those that a float16 scaler or a guard skipped.

    With a fused optimizer under a scaler `step` waits for the device, which alone knows whether it overflowed.

    Args:
        optimizer: whose rates are multiplied.
        factor: of the number of steps taken so far.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self._verdict: Any = 0.0
        super().__init__(optimizer, factor)
        self._verdict = None
        optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Not called where a scaler skips; a fused optimizer is, and says in `found_inf` that it did nothing."""
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            self._verdict = getattr(optimizer, "found_inf", 0.0)

    def step(self, epoch: int | None = None) -> None:
        """Advance, if the optimizer has."""
        verdict, self._verdict = self._verdict, None
        if verdict is not None and float(verdict) == 0:
            super().step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What LambdaLR saves."""
        return {name: value for name, value in super().state_dict().items() if name != "_verdict"}
