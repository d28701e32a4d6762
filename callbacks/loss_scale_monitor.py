"""Watch the loss scale of float16 training."""

from __future__ import annotations

from typing import Any

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
from lightning_diffusion.norms import Gradients


class LossScaleMonitor(GradientCallback):
    """Log the loss scale and what overflows, warn when the scale collapses, stop when it lies on its floor.

    torch's scaler halves its scale at every overflow, down to 0.0, and says nothing: the run then goes on without
    ever taking a step.

    When:   always with float16. Without a loss scaler it says once that there is nothing to watch.
    Costs:  the norm that clipping needs as well.
    Knobs:  floor, or the scaler's own (LossScaling's) where that is higher; patience_steps.
    With:   put it before GradientClipping.
    Logs:   train/loss_scale, train/loss_scale_growth_tracker (steps since it last changed), train/skipped_steps
            (in the whole training), train/overflow_rate (share of steps since the last logging step).

    Args:
        warn_below: a scale that has collapsed.
        floor: a scale that cannot be trained with.
        patience_steps: overflows at the floor, without the scale having risen above it, until the run is stopped.
    """

    def __init__(self, warn_below: float = 1.0, floor: float = 2.0**-10, patience_steps: int = 50) -> None:
        if not 0 <= floor <= warn_below or patience_steps < 1:
            raise ValueError(
                f"LossScaleMonitor({warn_below=}, {floor=}, {patience_steps=}): expected 0 <= floor <= warn_below and "
                "at least 1 step, such as 1.0, 2**-10 and 50."
            )
        self.warn_below, self.floor, self.patience_steps = warn_below, floor, patience_steps
        self._names: dict[int, str] = {}
        self._skipped_before, self._warned = 0, False
        self._watched: dict[int, _Overflows] = {}

    @property
    def skipped_steps(self) -> int:
        """Steps of all optimizers that were skipped in the whole training; waits for the device."""
        return self._skipped_before + sum(int(watched.skipped) for watched in self._watched.values())

    @property
    def overflows(self) -> dict[str, int]:
        """Since the start of fit, how often each parameter's gradient overflowed; waits for the device."""
        counts = [watched.by_name() for watched in self._watched.values()]
        return {name: count for found in counts for name, count in found.items() if count}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._skipped_before, self._watched, self._warned = self.skipped_steps, {}, False
        self._names = {id(p): name for name, p in pl_module.named_parameters()}
        if scaler_of(trainer) is None:
            rank_zero_info(
                "LossScaleMonitor has nothing to watch: there is no loss scaler, which only float16 needs."
            )

    def on_gradients(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, gradients: Gradients
    ) -> None:
        scaler = scaler_of(trainer)
        if scaler is None:
            return
        watched = self._watched.setdefault(id(optimizer), _Overflows(self._names))
        watched.add(gradients, scaler._get_scale_async() <= max(self.floor, getattr(scaler, "floor", 0.0)))
        if logs_this_step(trainer):
            state = scaler.state_dict()
            rate = float(watched.pop_rate())
            found: dict[str, Tensor | float] = {"loss_scale": state["scale"], "overflow_rate": rate}
            found["loss_scale_growth_tracker"] = float(state["_growth_tracker"])
            found["skipped_steps"] = float(self.skipped_steps)
            log_now(trainer, pl_module, optimizer, found)
            self._judge(state["scale"], watched)

    def _judge(self, scale: float, watched: _Overflows) -> None:
        if int(watched.at_floor) >= self.patience_steps:
            raise RuntimeError(
                f"The loss scale has sunk to {scale:.3g} and {int(watched.at_floor)} steps overflowed there, so "
                f"nothing is learnt any more. {_remedies(watched)}"
            )
        if scale < self.warn_below and not self._warned:
            rank_zero_warn(
                f"The loss scale has sunk to {scale:.3g}: small gradients are lost. {_remedies(watched)}"
            )
        self._warned = scale < self.warn_below

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped_before, self._watched = state_dict["skipped_steps"], {}


class _Overflows:
    """What overflowed in one optimizer's steps, counted on the device."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.skipped: Tensor | int = 0
        self.at_floor: Tensor | int = 0
        self.counts: dict[tuple[int, ...], Tensor] = {}
        self._recent: Tensor | int = 0
        self._steps = 0

    def add(self, gradients: Gradients, at_floor: Tensor) -> None:
        broken = torch.stack(gradients.norms).isfinite().logical_not().long()
        key = tuple(map(id, gradients.parameters))
        self.counts[key] = self.counts.get(key, torch.zeros_like(broken)) + broken
        skipped = broken.amax()
        self.skipped, self._recent, self._steps = (
            self.skipped + skipped,
            self._recent + skipped,
            self._steps + 1,
        )
        self.at_floor = (self.at_floor + skipped) * at_floor.to(skipped.device)

    def pop_rate(self) -> Tensor | float:
        """Share of skipped steps since it was last asked for."""
        rate = self._recent / self._steps
        self._recent, self._steps = 0, 0
        return rate

    def by_name(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for key, counts in self.counts.items():
            for parameter, count in zip(key, counts.tolist(), strict=True):
                name = self.names.get(parameter, "unnamed")
                found[name] = found.get(name, 0) + count
        return found


def _remedies(watched: _Overflows) -> str:
    by_count = sorted(watched.by_name().items(), key=lambda item: -item[1])
    worst = [f"{name} ({count} times)" for name, count in by_count[:3] if count]
    where = f"Gradients that overflowed most: {', '.join(worst)}. " if worst else ""
    return (
        f"{where}Train in bf16-mixed where there is hardware for it; else lower the learning rate, clip gradients, "
        "look for NaN in the data, or keep the layers named here in float32."
    )
