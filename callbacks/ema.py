"""Averages of the weights along training.

E <- beta E + (1 - beta) theta after every optimizer step that was really taken. The module trains on theta,
the online weights, and validates, tests and predicts with E. Checkpoints hold theta in `state_dict` and E in
the callback's own state, as float32 tensors by parameter name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_diffusion.averager import ModelAverages, parameters_to_average, state_of_weight_averaging
from lightning_diffusion.averaging import STATE_KEY, Averages
from lightning_diffusion.profiles import Profile, profiles_by_name
from lightning_diffusion.recorder import Recorder, Snapshots, new_run, widths_of
from lightning_diffusion.snapshots import Place, network_hash
from lightning_diffusion.swapping import Swap


class EMA(Callback):
    """Evaluate with running averages of the weights, train on with the weights themselves.

    When:   always for diffusion models; averaged weights draw far better samples.
    Costs:  one float32 copy of the trainable parameters per average and one pass over it per update; one more
            copy while averages are swapped in.
    Knobs:  decay; every_n_steps=8 makes the time vanish at nearly the same average.
    With:   any LightningModule, strategy, precision and number of optimizers, also manual optimization.
            Buffers and frozen parameters are always the live module's.

    Args:
        decay: share of itself that the average keeps per step, or a profile, or several profiles by name, the
            first of which is evaluated.
        every_n_steps: optimizer steps per update; the decay is compounded exactly.
        start_step: optimizer steps before which the average is simply the weights.
        only: patterns of the parameters' names, such as ["generator.*"]; if not given all trainable ones, or
            those of the module's `averaged_parameters()`.
        snapshots: keeps power-function averages on disk, to rebuild one of any width after training.
    """

    def __init__(
        self,
        decay: float | Profile | dict[str, Profile] = 0.999,
        every_n_steps: int = 1,
        start_step: int = 0,
        only: list[str] | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        if every_n_steps < 1 or start_step < 0:
            raise ValueError(
                f"{every_n_steps=} has to be at least 1 and {start_step=} at least 0 optimizer steps."
            )
        self.profiles = profiles_by_name(decay)
        self.every_n_steps, self.start_step, self.only = every_n_steps, start_step, only
        self.snapshots, self._widths = snapshots, widths_of(self.profiles) if snapshots else {}
        self._recorder: Recorder | None = None
        self._record: dict[str, Any] = {}
        self._running: ModelAverages | None = None
        self._module: LightningModule | None = None
        self._loaded: dict[str, Any] | None = None
        self._swap: Swap | None = None
        self._global_step, self._warned = 0, False

    @property
    def state_key(self) -> str:
        """The same for every profile, so that a resumed run may change it."""
        return STATE_KEY

    @contextmanager
    def average_parameters(self, pl_module: LightningModule, name: str | None = None) -> Iterator[None]:
        """Compute with an average (the first, if not named) inside, with the weights as before afterwards."""
        swap = self._swap_of(pl_module)
        before = swap.current
        swap.put(self._choose(pl_module, name))
        try:
            yield
        finally:
            swap.put(before)

    def _choose(self, pl_module: LightningModule, name: str | None = None) -> Mapping[str, Tensor] | None:
        averages = self._averages_of(pl_module)
        if name is not None and name not in averages:
            raise ValueError(
                f"There is no average {name!r}, only {', '.join(map(repr, averages)) or 'none'}."
            )
        return averages[name or next(iter(averages))] if averages else None

    def _averages_of(self, pl_module: LightningModule) -> Averages:
        """Those of its training, else those of a checkpoint, else what the module itself brings."""
        if self._running is not None and pl_module is self._module:
            self._restore(self._running)
            return self._running.averages if self._running.moved else {}
        if self._loaded is not None:
            return dict(self._loaded["averages"])
        return dict(getattr(pl_module, "averages", {}))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back()
        _warn_of_weights_only(trainer, pl_module)
        running = self._new_averages(trainer, pl_module)
        if self._running is not None:
            self._running.stop()
            self._continue(self._running, running, pl_module)
        if pl_module is not self._module:
            self._record = {}
        self._running, self._module, self._global_step = running, pl_module, trainer.global_step
        self._restore(running)
        running.follow()
        _publish(running.averages, pl_module)

    def _new_averages(self, trainer: Trainer, pl_module: LightningModule) -> ModelAverages:
        parameters = parameters_to_average(pl_module, self.only)
        timing = self.every_n_steps, self.start_step
        running = ModelAverages(self.profiles, parameters, trainer.optimizers, *timing)
        running.gathers = not getattr(trainer.strategy, "writes_shards", False)
        return running

    def _continue(self, old: ModelAverages, new: ModelAverages, pl_module: LightningModule) -> None:
        """A second `fit` of the same module goes on with its averages."""
        if (
            self._loaded is None
            and pl_module is self._module
            and old.parameters.keys() == new.parameters.keys()
        ):
            self._loaded = old.state_dict()

    def _restore(self, running: ModelAverages) -> None:
        if self._loaded is not None:
            _warn_of_changes(self._loaded, self.profiles)
            running.load_state_dict(self._loaded)
            self._record, self._loaded = self._loaded.get("snapshots", {}), None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._running is not None:
            self._restore(self._running)
            _publish(self._running.averages, pl_module)  # strategies that shard have loaded others meanwhile
            if self.snapshots is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._recorder = self._start_recording(trainer, self._running, self.snapshots)

    def _start_recording(self, trainer: Trainer, running: ModelAverages, plan: Snapshots) -> Recorder:
        folder = plan.directory or self._record.get("folder")
        if folder is None or not (plan.directory or Path(folder).is_dir()):
            folder = str(Path(trainer.log_dir or trainer.default_root_dir, "snapshots"))
        every = plan.every_n_steps or self._record.get("every") or _a_64th(trainer)
        self._record = {"run": self._record.get("run") or new_run(), "folder": folder, "every": every}
        place = Place(Path(folder), self._record["run"], network_hash(running.parameters), plan.storage)
        recorder = Recorder(running, place, every, plan.keep, trainer.is_global_zero)
        rank_zero_info(recorder.budget(trainer.estimated_stepping_batches))
        return recorder

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._running is not None and any(p.clock == "images" for p in self.profiles.values()):
            self._running.images += extract_batch_size(batch) * trainer.world_size

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._running is not None and trainer.global_step != self._global_step:
            self._global_step, self._running.images = trainer.global_step, 0
            if self._recorder is not None:
                self._recorder.after_step()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._running is not None and not self._warned:
            late = self._running.left_out(parameters_to_average(pl_module, self.only))
            self._warned = bool(late)
            if late:
                rank_zero_warn(
                    f"{late[0]!r} and {len(late) - 1} others are trained only since after the start of fit: they are "
                    "evaluated as they are, not averaged. A new call of fit begins averages of all."
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is not None:
            self._recorder.finish()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_in(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_in(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_in(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        self._put_back()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        if self._running is not None:
            self._running.stop()

    def _put_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = self._choose(pl_module)
        if weights is None and trainer.state.fn != TrainerFn.FITTING:
            rank_zero_warn(
                f"{type(self).__name__} has no averages of this module, so its weights are used as they are. "
                "Pass `ckpt_path` of a run with this callback."
            )
        self._swap_of(pl_module).put(weights)

    def _put_back(self) -> None:
        if self._swap is not None:
            self._swap.put(None)

    def _swap_of(self, pl_module: LightningModule) -> Swap:
        if self._swap is None or self._swap.module is not pl_module:
            self._put_back()
            self._swap = Swap(pl_module)
        return self._swap

    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        if self._recorder is not None:
            self._recorder.flush()
        return {**self._running.state_dict(), "snapshots": self._record} if self._running is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from a checkpoint of Lightning's own WeightAveraging, whose `state_dict` is the average."""
        if {"averaging_state", "current_model_state"} <= checkpoint.keys():
            pl_module.load_state_dict(checkpoint["current_model_state"])
            (name, profile), *_ = self.profiles.items()
            parameters = parameters_to_average(pl_module, self.only)
            self._loaded = state_of_weight_averaging(checkpoint, name, profile, parameters)


def _a_64th(trainer: Trainer) -> int:
    total = trainer.estimated_stepping_batches
    if not math.isfinite(total):
        raise ValueError("The run has no end, so snapshots cannot be a 64th of it apart: give every_n_steps.")
    return max(1, int(total) // 64)


def _publish(averages: Averages, pl_module: LightningModule) -> None:
    published = getattr(pl_module, "averages", None)
    if isinstance(published, dict):
        published.clear()
        published.update(averages)


def _warn_of_weights_only(trainer: Trainer, pl_module: LightningModule) -> None:
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if any(c.save_weights_only for c in checkpoints) and not hasattr(pl_module, "averages"):
        rank_zero_warn(
            "ModelCheckpoint(save_weights_only=True) asks no callback, so its files will hold the online "
            "weights and no averages. Write save_weights_only=False, or let the module save them: "
            "`self.averages = {}` in __init__, which this callback fills, and "
            '`checkpoint["averages"] = self.averages` in on_save_checkpoint.'
        )


def _warn_of_changes(state: Mapping[str, Any], profiles: Mapping[str, Profile]) -> None:
    for name, profile in profiles.items():
        if name not in state["averages"]:
            rank_zero_warn(
                f"The checkpoint holds no average {name!r}: it begins anew with the present weights."
            )
        elif state["profiles"][name] != repr(profile):
            rank_zero_warn(
                f"The average {name!r} was {state['profiles'][name]} and goes on as {profile!r} from here."
            )
