"""SIGTERM and Ctrl-C end a run after the current batch, with a checkpoint."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_diffusion.io import CHECKPOINTS, LAST, publish, temporary_beside

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SaveOnSignal(Callback):
    """Finish the batch, write a full checkpoint, leave with status 143 (SIGTERM) or 130 (Ctrl-C).

    When:   schedulers that give a grace period, preemptible machines, people.
    Costs:  nothing; with several processes one small reduction per batch, so that all stop at the same one.
    Knobs:  where the checkpoint goes; by default beside those of ModelCheckpoint.
    With:   a second Ctrl-C ends at once. Strategies that fork or spawn (ddp_notebook) keep Lightning's way, for
            their processes do not hear of exceptions. Resume with `trainer.fit(module, ckpt_path=callback.path)`.

    Args:
        dirpath: folder of the checkpoint.
        filename: its name there; an older one is replaced.
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str = LAST) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self.path: Path | None = None
        self.status: int | None = None
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._owner = os.getpid()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            shielding.workers = True
            shielding.register()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        shielding.workers = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received, self._owner = None, os.getpid()
        if _hears_signals(trainer):
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop_together(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.world_size == 1:
            self._stop_together(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_together(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_signals_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + (self._received or signal.SIGTERM)
        stopped = self._received is not None or isinstance(exception, SIGTERMException)
        if stopped and _is_between_batches(trainer):
            self._save(trainer)
            self.status = 128 + (self._received or signal.SIGTERM)
            atexit.register(_leave_process_group)
        self._give_signals_back()
        shielding.workers = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a forked process: the parent decides
        if number == signal.SIGINT and self._received is not None:
            os._exit(128 + signal.SIGINT)
        self._received = self._received or number
        os.write(2, b"\nFinishing the batch, then saving a checkpoint; Ctrl-C (again) ends at once.\n")

    def _stop_together(self, trainer: Trainer) -> None:
        if not self._previous:
            return
        stop = self._received is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            trainer._signal_connector.received_sigterm = True  # Lightning raises once all hooks have run

    def _save(self, trainer: Trainer) -> None:
        self.path = self._folder(trainer) / self.filename
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(self.path) as temporary:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                publish(temporary, self.path)
        rank_zero_info(f"Stopped at step {trainer.global_step}, saved {self.path}")

    def _folder(self, trainer: Trainer) -> Path:
        beside = getattr(trainer.checkpoint_callback, "dirpath", None)
        return Path(self.dirpath or beside or Path(trainer.log_dir or trainer.default_root_dir, CHECKPOINTS))

    def _give_signals_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class _Shielding:
    """While a run lasts, data-loader workers do not hear the two signals, which may come to all processes at once.

    A worker that died of one would take the batch along that is being finished. As they do not hear Python's call to
    end either, they are killed at exit; without a parent they end by themselves.
    """

    def __init__(self) -> None:
        self.workers = False
        self._registered = False

    def register(self) -> None:
        if not self._registered:
            os.register_at_fork(after_in_child=self._in_child)
            atexit.register(_kill_workers)
            self._registered = True

    def _in_child(self) -> None:
        frame: FrameType | None = sys._getframe()
        while self.workers and frame is not None:
            if frame.f_globals.get("__name__") == "torch.utils.data.dataloader":
                signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                break
            frame = frame.f_back


shielding = _Shielding()


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _hears_signals(trainer: Trainer) -> bool:
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def _is_between_batches(trainer: Trainer) -> bool:
    progress = trainer.fit_loop.epoch_loop.batch_progress.total
    return bool(progress.ready == progress.completed > 0)


def _leave_process_group() -> None:
    """Processes that end while their group is alive were seen to hang."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
