"""The LightningModule: a network, an objective, a representation, a sampler, an optimizer, a learning rate."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_diffusion.averager import whole
from lightning_diffusion.averaging import averages_in
from lightning_diffusion.batches import (
    CONTEXT,
    LABEL,
    Repeatable,
    declared_conditions,
    drop_conditions,
    every_sample,
    unpack,
)
from lightning_diffusion.checks import check_encoded, check_images
from lightning_diffusion.drawing import Drawing
from lightning_diffusion.learning_rates import LearningRate, TakenStepsLR, WarmupConstant
from lightning_diffusion.networks import Network
from lightning_diffusion.objective import DiffusionObjective, Report
from lightning_diffusion.presets import EDM
from lightning_diffusion.recording import INSTANTIATOR, spec
from lightning_diffusion.reports import Reports
from lightning_diffusion.representation import Identity, Representation
from lightning_diffusion.resume import RandomKey, hash_seed, rewind_to_window_, run_seed
from lightning_diffusion.sampling import Heun, Sampler
from lightning_diffusion.sharding import shard_under_strategy_

CHECKPOINT_FORMAT = 1


class DiffusionModule(Drawing, L.LightningModule):
    """Trains a network on an objective and samples from it.

    Batches are images (B, C, H, W) in [-1, 1], or (images, labels), or {"image": ..., "label": ..., "context": ...}.

    Args:
        network: called as network(x, c_noise, label=...), see `Network`; any nn.Module will do.
        objective: which levels, weight, target and coefficients.
        representation: between images and what is trained on.
        sampler: draws the samples of `sample`, unless another is given there.
        optimizer: makes the optimizer from parameters.
        learning_rate: the factor on the optimizer's learning rate over steps.
        label_dropout: share of labels and contexts replaced by null ones, for classifier-free guidance; 1 trains
            without.

    Raises:
        ValueError: where parts do not fit each other.
    """

    def __init__(
        self,
        network: Network | nn.Module,
        objective: DiffusionObjective = EDM(),
        representation: Representation = Identity(),
        sampler: Sampler = Heun(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        learning_rate: LearningRate = WarmupConstant(),
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        _check_parts(network, objective, representation, label_dropout)
        self.network = network
        self.objective = copy.deepcopy(objective)
        self.representation = copy.deepcopy(representation)
        self.sampler = sampler
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.label_dropout = label_dropout
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._reports = Reports()
        self._checked: set[str] = set()
        self.save_hyperparameters(self._recorded_parts())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        key = self._key(batch_idx)
        images, condition = self._prepare("train", batch)
        condition = drop_conditions(condition, self.num_classes, self.label_dropout, key)
        report = self._loss(images, condition, key)
        self._reports.add(report.detach(), starts_step=batch_idx % key.accumulate == 0)
        if self._logs_this_step:
            self.log("train/loss", self._reports.take_mean_loss(), sync_dist=True, prog_bar=True)
        return report.loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The loss at the same stratified levels and noise in every epoch and run."""
        return self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """As validation_step."""
        return self._evaluate("test", batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Samples (B, C, H, W) under the batch's conditions."""
        images, condition = self._prepare("predict", batch)
        return self.sample(len(images), condition, seed=hash_seed("predict", batch_idx, dataloader_idx))

    @property
    def report(self) -> Report:
        """Loss (), per-sample loss and level (B,) of all micro-batches since the last optimizer step, detached."""
        return self._reports.joined()

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """What an average should follow: the network's trainable parameters, by their names in this module."""
        return {f"network.{name}": p for name, p in self.network.named_parameters() if p.requires_grad}

    def low_precision_modules(self) -> list[nn.Module]:
        """What precision plugins run in low precision: the network alone."""
        return [self.network]

    def configure_model(self) -> None:
        """Under ModelParallelStrategy (FSDP2) shard the network block by block; elsewhere nothing."""
        shard_under_strategy_(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        self._configured = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        total, images = self.trainer.estimated_stepping_batches, self._images_per_step()
        factor = TakenStepsLR(optimizer, lambda step: self.learning_rate(step, total, images))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    def on_fit_start(self) -> None:
        self._checked.clear()
        if self.representation.needs_measuring:
            self.representation.measure(self._training_images())
        stable_target = self.objective.stable_target
        if stable_target is not None and stable_target.reference_size:
            stable_target.remember(self._training_set())

    def on_train_start(self) -> None:
        """The configured optimizer settings win over those that a checkpoint has just restored."""
        scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
        scheduler.base_lrs = [float(configured["lr"]) for configured in self._configured]
        (optimizer,) = self.trainer.optimizers
        for group, configured, factor in zip(
            optimizer.param_groups, self._configured, scheduler.lr_lambdas, strict=True
        ):
            lr = configured["lr"] * factor(scheduler.last_epoch)
            group.update(configured, initial_lr=configured["lr"], lr=lr)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Random numbers of the network's own, such as dropout's, resume like all others."""
        seed = hash_seed(run_seed(), "network", self.current_epoch, batch_idx, self.global_rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 2 ms where there is no CUDA
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lightning_diffusion"] = {"format": CHECKPOINT_FORMAT, "seed": run_seed()}
        if "callbacks" not in checkpoint and self.averages:
            checkpoint["averages"] = {name: whole(average) for name, average in self.averages.items()}
        rewind_to_window_(checkpoint, self.trainer.accumulate_grad_batches)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        _check_format(checkpoint)
        _check_representation(self.representation, checkpoint.get("state_dict", {}))
        self.averages = averages_in(checkpoint)

    def _recorded_parts(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("network", "objective", "representation", "sampler")}
        specs = {name: made for name, part in parts.items() if (made := spec(part)) is not None}
        return {**INSTANTIATOR, **specs, "label_dropout": self.label_dropout}

    def _key(self, batch_idx: int) -> RandomKey:
        trainer = self.trainer
        accumulate = trainer.accumulate_grad_batches
        return RandomKey(
            run_seed(), trainer.current_epoch, batch_idx, accumulate, trainer.global_rank, trainer.world_size
        )

    def _evaluate(self, stage: str, batch: Any, batch_idx: int) -> Tensor:
        images, condition = self._prepare(stage, batch)
        key = RandomKey(
            hash_seed(stage), batch=batch_idx, rank=self.global_rank, world_size=self.trainer.world_size
        )
        loss = self._loss(images, condition, key).loss
        self.log(f"{stage}/loss", loss, batch_size=len(images), sync_dist=True, prog_bar=True)
        return loss

    def _prepare(self, stage: str, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, condition = unpack(batch)
        images = images if images.dtype == torch.float64 else images.float()
        if stage not in self._checked or (stage == "train" and self._logs_this_step):
            self._checked.add(stage)
            self._check(images, condition)
            self._check_references(stage, images, condition)
        return images, {name: condition[name] for name in condition if name in self._conditions}

    def _loss(self, images: Tensor, condition: dict[str, Tensor], key: RandomKey) -> Report:
        try:
            x0 = self.representation.draw(images, key)
            check_encoded(x0, self.image_shape)
            return self.objective.loss(self.network, x0, condition, key)
        except IndexError:  # a label beyond the embedding, in a batch that was not checked
            self._check(images, condition)
            raise

    def _check(self, images: Tensor, condition: dict[str, Tensor]) -> None:
        if LABEL in condition and LABEL not in self._conditions and self.label_dropout < 1:
            raise ValueError(
                f"The batch has labels, but {type(self.network).__name__} takes none. Give the network num_classes "
                "(in YAML, network.init_args.num_classes: 10), or set label_dropout: 1.0 to train without labels."
            )
        if CONTEXT in condition and CONTEXT not in self._conditions:
            raise ValueError(
                f"The batch has a context, but {type(self.network).__name__} takes none. Use a UNet with "
                "context_dim, or leave the context out of the batches."
            )
        label = condition.get(LABEL) if LABEL in self._conditions else None
        value_range = (-1.0, 1.0) if self.representation.bounded else None
        shape = self.image_shape if self.representation.keeps_shape else None
        check_images(images, label, self.num_classes, shape, value_range)

    def _check_references(self, stage: str, images: Tensor, condition: dict[str, Tensor]) -> None:
        if stage == "train" and self.objective.stable_target is not None:
            label = condition.get(LABEL) if LABEL in self._conditions else None
            self.objective.stable_target.check(self.representation.draw(images, RandomKey()), label)

    @cached_property
    def _conditions(self) -> set[str]:
        declared = declared_conditions(self.network)
        unlabelled = getattr(self.network, "num_classes", None) == 0 or self.label_dropout >= 1
        return declared - {LABEL} if unlabelled else declared

    @property
    def _logs_this_step(self) -> bool:
        return (self.trainer.global_step + 1) % self._log_every == 0

    @property
    def _log_every(self) -> int:
        return int(self.trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def _training_images(self) -> Iterable[Tensor]:
        """Images of the training batches; can be gone through again."""
        return Repeatable(lambda: (unpack(batch)[0].to(self.device) for batch in self._own_train_loader()))

    def _own_train_loader(self) -> Any:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        return datamodule.train_dataloader() if datamodule else self._train_loader()

    def _training_set(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Every training sample once, encoded, with its label."""
        for batch in every_sample(self._own_train_loader()):
            images, condition = unpack(batch)
            label = condition[LABEL].to(self.device) if LABEL in condition else None
            yield self.representation.encode(images.to(self.device)), label

    def _train_loader(self) -> Any:
        self.trainer.fit_loop.setup_data()
        return self.trainer.train_dataloader

    def _images_per_step(self) -> int:
        if not self.learning_rate.warmup_images:
            return 1
        loader = self._train_loader()
        return int(loader.batch_size * self.trainer.accumulate_grad_batches * self.trainer.world_size)


def _check_parts(
    network: nn.Module, objective: DiffusionObjective, representation: Representation, label_dropout: float
) -> None:
    if representation.sigma_data not in (None, objective.sigma_data):
        raise ValueError(
            f"{type(representation).__name__} puts out data of deviation {representation.sigma_data}, but the "
            f"objective assumes {objective.sigma_data}. Set representation.init_args.sigma_data: "
            f"{objective.sigma_data}, or the objective's sigma_data to {representation.sigma_data}."
        )
    if not 0 <= label_dropout <= 1:
        raise ValueError(f"Found label_dropout={label_dropout}; expected a share between 0 and 1.")


def _check_format(checkpoint: dict[str, Any]) -> None:
    found = checkpoint.get("lightning_diffusion", {}).get("format")
    if found != CHECKPOINT_FORMAT:
        raise ValueError(
            f"Found a checkpoint of format {found}; this version of lightning-diffusion reads {CHECKPOINT_FORMAT}. "
            "It was written by something else, or by a newer version: install that one."
        )


def _check_representation(representation: Representation, state: dict[str, Tensor]) -> None:
    saved = any(name.startswith("representation.") for name in state)
    if saved and not representation.state_dict():
        raise ValueError(
            "The checkpoint's representation is made of parts that cannot be recorded, such as a foreign autoencoder: "
            "give load_from_checkpoint(..., representation=...) the one that it was trained with. An autoencoder that "
            "is a subclass of lightning_diffusion.Autoencoder is recorded."
        )
