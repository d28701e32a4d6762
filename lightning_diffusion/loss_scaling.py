"""Dynamic loss scaling: float16 gradients of small losses would be zero, so the loss is multiplied before backward.

scale <- scale growth_factor      after growth_interval steps without an overflow
scale <- scale backoff_factor     at an overflow, whose step is skipped
floor <= scale <= ceiling         torch's own scaler goes down to 0.0 and says nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossScaling:
    """How the loss scale moves.

    Args:
        start: scale of the first step.
        growth_factor: above 1.
        backoff_factor: between 0 and 1.
        growth_interval: steps without an overflow before the scale grows.
        floor, ceiling: the scale stays between them, 0 < floor <= start <= ceiling.
    """

    start: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    floor: float = 2.0**-10
    ceiling: float = 2.0**24

    def __post_init__(self) -> None:
        if not 0 < self.floor <= self.start <= self.ceiling < float("inf"):
            raise ValueError(
                f"Found {self}; expected 0 < floor <= start <= ceiling, such as 2**-10, 2**16 and 2**24."
            )
        if not (self.growth_factor > 1 and 0 < self.backoff_factor < 1 and self.growth_interval >= 1):
            raise ValueError(
                f"Found {self}; expected growth_factor > 1, backoff_factor between 0 and 1, and a growth_interval of "
                "at least 1 step, such as 2.0, 0.5 and 2000."
            )


class LossScaler(torch.amp.GradScaler):
    """torch's scaler with a floor and a ceiling; nothing waits for the device.

    Args:
        device_type: where losses are.
        scaling: how the scale moves.
    """

    def __init__(self, device_type: str, scaling: LossScaling) -> None:
        super().__init__(
            device_type,
            init_scale=scaling.start,
            growth_factor=scaling.growth_factor,
            backoff_factor=scaling.backoff_factor,
            growth_interval=scaling.growth_interval,
        )
        self.scaling = scaling

    @property
    def floor(self) -> float:
        """The smallest scale."""
        return self.scaling.floor

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """After a step: grow, back off or stay, within floor and ceiling."""
        super().update(new_scale)
        if self.is_enabled() and self._scale is not None:
            self._scale.clamp_(self.scaling.floor, self.scaling.ceiling)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the scale of a checkpoint, under the settings of this run."""
        if not state_dict:
            return
        scale = min(max(state_dict["scale"], self.scaling.floor), self.scaling.ceiling)
        tracker = state_dict["_growth_tracker"]
        super().load_state_dict({**self.state_dict(), "_growth_tracker": tracker, "scale": scale})
