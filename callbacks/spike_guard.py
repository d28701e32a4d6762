"""Steps that would spoil a training are not taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_diffusion.callbacks.ema import EMA
from lightning_diffusion.callbacks.gradient_callback import (
    GradientCallback,
    log_now,
    logs_this_step,
    scaler_of,
)
from lightning_diffusion.callbacks.gradient_clipping import GradientClipping
from lightning_diffusion.callbacks.gradient_sanitizer import GradientSanitizer
from lightning_diffusion.norms import Gradients
from lightning_diffusion.rollback import (
    Buffers,
    Training,
    copy_rates,
    copy_training,
    restore_rates_,
    restore_training_,
)
from lightning_diffusion.spikes import BAND_EDGES, Action, Spike, SpikeEvent, SpikeMonitor, SpikeRule
from lightning_diffusion.step_gradients import forget_gradients
from lightning_diffusion.step_values import NORM, StepValues

SETTLED = 10  # steps that a copy has to be older than a row of spikes: their cause began before


class SpikeGuard(GradientCallback):
    """Skip steps whose loss or gradient is far above what it was, and put weights back that spikes show to be bad.

    A skipped step changes nothing: neither weights, momenta, buffers, averages (of EMA here) nor learning rates that
    follow steps; the data goes on. After several spikes in a row weights, optimizers, averages and rates are put back
    to a copy in memory, from before the spikes.

    When:   long runs, NaN or outliers in the data, rates near the edge. What is logged says which samples.
    Costs:  the norm that clipping needs as well; in every step one transfer of at most 18 numbers to the host, which
            waits for the device, after one all-reduce of them; two copies of what is put back in the host's memory.
    Knobs:  the rule, of which the default should do: see SpikeRule.
    With:   after LossScaleMonitor, before GradientSanitizer and GradientClipping in the list of callbacks. A loss
            scaler goes on skipping what overflows. Losses are watched by bands of log-SNR where the module has a
            `report`. In manual optimization, and if one follows epochs or a metric, learning rates are left alone.
    Logs:   train/spikes and train/rollbacks, in the whole training; each event as a warning and in `events`.

    Args:
        rule: what a spike is, when weights are put back, when the run is given up.
        band_edges: log-SNR between bands, increasing; -6, -4, ..., 6 if not given.
        snapshot_every_n_steps: between copies, at least 1. A checkpoint is a copy, too.
    """

    def __init__(
        self,
        rule: SpikeRule = SpikeRule(),
        band_edges: list[float] | None = None,
        snapshot_every_n_steps: int = 50,
    ) -> None:
        edges = list(BAND_EDGES if band_edges is None else band_edges)
        if snapshot_every_n_steps < 1 or not all(a < b for a, b in pairwise(edges)):
            raise ValueError(
                f"SpikeGuard({band_edges=}, {snapshot_every_n_steps=}): expected increasing log-SNR, such as "
                "[-4.0, 0.0, 4.0], and at least 1 step."
            )
        self.rule, self.band_edges, self.snapshot_every_n_steps = rule, edges, snapshot_every_n_steps
        self.events: list[SpikeEvent] = []
        self._watched = StepValues(edges)
        self._monitors: dict[int, SpikeMonitor] = {}
        self._snapshots: list[_Snapshot] = []
        self._module: LightningModule | None = None
        self._buffers: Buffers | None = None
        self._back_to: _Snapshot | None = None
        self._verdict: Action | None = None
        self._rates: dict[str, Any] | None = None
        self._sharded = False

    @property
    def state_key(self) -> str:
        """The same for every rule, so that a resumed run may change it."""
        return "SpikeGuard"

    @property
    def spikes(self) -> int:
        """Steps that were not taken."""
        return len(self.events)

    @property
    def rollbacks(self) -> int:
        """How often weights were put back."""
        return sum(event.action is Action.ROLL_BACK for event in self.events)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        _check_optimizers(trainer)
        _check_order(self, trainer)
        if self._module is not None:  # nothing was loaded
            self._snapshots = []
            if pl_module is not self._module:
                self._monitors, self.events = {}, []
        self._module, self._buffers = pl_module, Buffers(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._verdict = self._rates = self._back_to = None
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._watched.forget()
            self._kept_buffers.keep()
        self._watched.add_batch(batch)
        if not self._snapshots:
            self._take_snapshot(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._watched.add_loss(loss)

    def on_gradients(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, gradients: Gradients
    ) -> None:
        values = self._values(trainer, pl_module, gradients)
        self._judge(trainer, pl_module, optimizer, values)
        if logs_this_step(trainer):
            counts = {"spikes": float(self.spikes), "rollbacks": float(self.rollbacks)}
            log_now(trainer, pl_module, optimizer, {**counts})

    def _values(self, trainer: Trainer, pl_module: LightningModule, gradients: Gradients) -> dict[str, float]:
        """Gradient norm and losses, the same on all processes."""
        scaler = scaler_of(trainer)
        factor = trainer.accumulate_grad_batches / (1.0 if scaler is None else scaler._get_scale_async())
        own = self._watched.vector(getattr(pl_module, "report", None), gradients.norm, factor)
        over_all: Any = trainer.strategy.reduce(own, reduce_op="mean")
        return self._watched.named(over_all.tolist())

    def _judge(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, values: Mapping[str, float]
    ) -> None:
        number = trainer.optimizers.index(optimizer)
        monitor = self._monitors.setdefault(number, SpikeMonitor(self.rule))
        overflows = scaler_of(trainer) is not None and not math.isfinite(values[NORM])
        judged = {name: x for name, x in values.items() if not (overflows and name == NORM)}
        action, spikes = monitor.judge(judged, counts=not overflows)
        if self._verdict in (None, Action.TAKE):
            self._verdict = action
        if spikes:
            self._skip(trainer, pl_module, optimizer)
            self._report(trainer, action, spikes)

    def _skip(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Without gradients an optimizer does nothing; zeros would still move weights by their momenta."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        forget_gradients()
        self._kept_buffers.restore_()
        self._rates = copy_rates(_training(trainer, pl_module))

    def _report(self, trainer: Trainer, action: Action, spikes: tuple[Spike, ...]) -> None:
        if action is Action.ROLL_BACK:
            self._back_to = self._settled_before(trainer.global_step - self.rule.rollback_after + 1)
        to_step = self._back_to.step if action is Action.ROLL_BACK and self._back_to else None
        indices = _over_processes(trainer, self._watched.indices)
        event = SpikeEvent(trainer.global_step, action, spikes, indices, to_step)
        self.events.append(event)
        rank_zero_warn(f"SpikeGuard: {event}")
        if action is Action.GIVE_UP:
            raise RuntimeError(
                f"SpikeGuard gives up: {self.spikes} steps were not taken, and putting the weights back "
                f"({self.rollbacks} times) has not helped. {event} Look at the samples named in the warnings, lower "
                "the learning rate, warm it up longer, or clip gradients; if the values are as they should be, raise "
                "SpikeRule's ratio or threshold."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        self._snapshots = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._back_to is not None:
            self._roll_back(_training(trainer, pl_module), self._back_to)
        elif self._rates is not None:
            restore_rates_(_training(trainer, pl_module), self._rates)
        elif self._verdict is Action.TAKE and trainer.global_step % self.snapshot_every_n_steps == 0:
            self._take_snapshot(trainer, pl_module)

    def _roll_back(self, training: Training, snapshot: _Snapshot) -> None:
        restore_training_(training, snapshot.content)
        self._snapshots, self._back_to = [snapshot], None

    def _settled_before(self, step: int) -> _Snapshot:
        """The newest that is old enough, else the oldest."""
        settled = [snapshot for snapshot in self._snapshots if snapshot.step <= step - SETTLED]
        return settled[-1] if settled else self._snapshots[0]

    def _take_snapshot(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training = _training(trainer, pl_module)
        content, self._sharded = copy_training(training), training.sharded
        self._snapshots = [*self._snapshots[-1:], _Snapshot(trainer.global_step, content)]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from here as a run does that is resumed from this checkpoint: it is the only copy."""
        if self._snapshots and not self._in_doubt:
            self._snapshots = []
            self._take_snapshot(trainer, pl_module)

    @property
    def _in_doubt(self) -> bool:
        return any(monitor.in_a_row for monitor in self._monitors.values())

    def state_dict(self) -> dict[str, Any]:
        """Copies only in the midst of a row of spikes, when the weights that are saved are doubtful."""
        monitors = {number: monitor.state_dict() for number, monitor in self._monitors.items()}
        saves = self._in_doubt and not self._sharded
        snapshots = [list(snapshot) for snapshot in self._snapshots] if saves else []
        return {
            "monitors": monitors,
            "events": [event.state_dict() for event in self.events],
            "snapshots": snapshots,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._monitors = {number: SpikeMonitor(self.rule) for number in state_dict["monitors"]}
        for number, state in state_dict["monitors"].items():
            self._monitors[number].load_state_dict(state)
        self.events = [SpikeEvent.from_state(state) for state in state_dict["events"]]
        self._snapshots = [_Snapshot(*snapshot) for snapshot in state_dict["snapshots"]]
        self._module = None

    @property
    def _kept_buffers(self) -> Buffers:
        assert self._buffers is not None
        return self._buffers


class _Snapshot(NamedTuple):
    """A training after `step` steps."""

    step: int
    content: dict[str, Any]


def _training(trainer: Trainer, pl_module: LightningModule) -> Training:
    """What is put back. Rates only where all follow steps: epochs and metrics go on as the data does."""
    configs = trainer.lr_scheduler_configs
    by_step = all(c.interval == "step" and not c.reduce_on_plateau for c in configs)
    own = by_step and pl_module.automatic_optimization
    emas = [c for c in trainer.callbacks if isinstance(c, EMA)]  # type: ignore[attr-defined]
    averages = [ema._running for ema in emas if ema._running is not None]
    schedulers = [config.scheduler for config in configs] if own else []
    return Training(pl_module, trainer.optimizers, averages, schedulers, scaler_of(trainer))


def _over_processes(trainer: Trainer, indices: list[int]) -> tuple[int, ...]:
    if trainer.world_size == 1:
        return tuple(indices)
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, indices)
    return tuple(index for part in parts for index in part)


def _check_optimizers(trainer: Trainer) -> None:
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise ValueError(
            "SpikeGuard cannot skip steps of LBFGS, which looks at several gradients in one step. Leave the guard out, "
            "or use another optimizer such as AdamW."
        )


def _check_order(guard: SpikeGuard, trainer: Trainer) -> None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    changing = (GradientClipping, GradientSanitizer)
    before = [type(c).__name__ for c in callbacks[: callbacks.index(guard)] if isinstance(c, changing)]
    if before:
        rank_zero_warn(
            f"SpikeGuard comes after {', '.join(before)} in the list of callbacks, so gradients were changed when it "
            "sees them: put it before."
        )
