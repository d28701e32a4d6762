"""What callbacks that look at gradients have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_diffusion.norms import Gradients
from lightning_diffusion.step_gradients import forget_gradients, step_gradients


class GradientCallback(Callback):
    """Acts on an optimizer's unscaled gradients right before its step; all such callbacks share one norm.

    They act in the order of the Trainer's list: look first, change afterwards. Not per micro-batch, and for each
    optimizer by itself, in automatic and in manual optimization.
    """

    looks_at_units = False
    """Whether it asks for norms of units, so that all others are made of them."""

    _by_unit = False
    _had_backward = False
    _acted = False
    _handles: tuple[RemovableHandle, ...] = ()

    @abstractmethod
    def on_gradients(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, gradients: Gradients
    ) -> None:
        """Gradients of at least one parameter, unscaled, before the optimizer uses them."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"{type(self).__name__} cannot see the gradients under {type(trainer.strategy).__name__}, which "
                "keeps them in shards of its own. Shard with ModelParallelStrategy (FSDP2), or use DDP."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_watching()
        every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._by_unit = any(c.looks_at_units for c in every if isinstance(c, GradientCallback))
        if not pl_module.automatic_optimization:
            self._handles = tuple(o.register_step_post_hook(self._after_step) for o in trainer.optimizers)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._had_backward = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._had_backward = True
        forget_gradients()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._acted = True
        scaler = scaler_of(trainer)
        if scaler is not None and pl_module.automatic_optimization and not self._had_backward:
            return  # training_step returned None: the scaler will neither step nor update
        gradients = step_gradients(optimizer, trainer.global_step, scaler, self._by_unit)
        if len(gradients):
            self.on_gradients(trainer, pl_module, optimizer, gradients)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_watching()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_watching()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._acted:
            self._stop_watching()
            rank_zero_warn(
                f"{type(optimizer).__name__}.step() was called on the bare optimizer, so {type(self).__name__} did "
                "not see its gradients. In manual optimization write `optimizer = self.optimizers()` and "
                "`optimizer.step()`."
            )
        self._acted = False

    def _stop_watching(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()


def scaler_of(trainer: Trainer) -> Any:
    """The Trainer's gradient scaler; None if it has none that is enabled."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def logs_this_step(trainer: Trainer) -> bool:
    """Whether what is logged in this step reaches the loggers."""
    return trainer._logger_connector.should_update_logs


def log_now(
    trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, values: dict[str, Tensor | float]
) -> None:
    """Log under train/NAME, with several optimizers under train/NAME/INDEX; on logging steps only."""
    index = f"/{trainer.optimizers.index(optimizer)}" if len(trainer.optimizers) > 1 else ""
    named = {f"train/{name}{index}": value for name, value in values.items()}
    pl_module.log_dict(named, on_step=True, on_epoch=False)
