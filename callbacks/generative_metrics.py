"""Whether the model gets better, by what it draws."""

from __future__ import annotations

import re
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_diffusion.averaging import resolve_weights
from lightning_diffusion.callbacks.ema import EMA
from lightning_diffusion.callbacks.held_out import held_out_loaders
from lightning_diffusion.classifier_features import ClassifierFeatures
from lightning_diffusion.contexts import refuse_context
from lightning_diffusion.features import FeatureExtractor
from lightning_diffusion.generative import (
    Draws,
    ReadyExtractor,
    RealFeatures,
    default_weights,
    diverged,
    drawn_features,
    few_samples,
    figures,
    get_ready,
    logged_names,
    real_features,
    real_images_of,
)
from lightning_diffusion.guidance import Guidance
from lightning_diffusion.real_images import FEWEST, RealImages
from lightning_diffusion.sharing import share_of

_QUICK = 16
_WITHOUT_CONTEXT = (
    "Leave GenerativeMetrics out, or measure your own samples with lightning_diffusion.metrics."
)


class GenerativeMetrics(Callback):
    """Frechet and kernel distance, precision and recall, and near-copies of training images, by drawing samples.

    When:   always where the loss does not tell which model draws better: it hardly ever does.
    Costs:  num_samples drawn and their features each time; those of real images once, then from a cache; 16 samples in
            fast_dev_run. None of training's random numbers, nothing in any state_dict, optimizer or average.
    Knobs:  num_samples, well above the extractor's features; figures of different numbers cannot be compared.
    With:   EMA or PowerFunctionEMA, listed before it; ModelCheckpoint(monitor="metrics/frechet_classifier_2000").
    Logs:   metrics/{frechet, kernel, precision, recall, near_copies, near_copies_held_out}_EXTRACTOR_NUMBER, followed
            by _WEIGHTS and _guidanceSCALE where they are given.

    Args:
        extractor: what looks at the images.
        num_samples: how many are drawn, by all processes together.
        every_n_steps: optimizer steps between two measurements; None: after every validation. Always at the end.
        weights: `online`, `ema`, `ema:NAME`, a file, or a list of these; None: `ema` where there are averages.
        guidance: such as ClassifierFree(1.5); None draws without.
        seed: of the samples; equal seeds draw from the same noise in every measurement and run, on any number of
            processes.

    Raises:
        ValueError, OSError: before the first step, if the extractor cannot be had or does not take the images.
    """

    def __init__(
        self,
        extractor: FeatureExtractor = ClassifierFeatures(),
        num_samples: int = 2000,
        every_n_steps: int | None = None,
        weights: str | list[str] | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
    ) -> None:
        if num_samples < FEWEST:
            raise ValueError(f"num_samples is {num_samples}, expected {FEWEST} or more, better thousands.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"every_n_steps is {every_n_steps}, expected 1 or more, or None for validations."
            )
        several: list[Any] = weights if isinstance(weights, list) else [weights]
        for one in several:
            _check_grammar(one)
        self.extractor, self.num_samples, self.every_n_steps = extractor, num_samples, every_n_steps
        self.draws = [Draws(num_samples, one, None, guidance, seed) for one in several]
        self._ready: ReadyExtractor | None = None
        self._real: RealFeatures | None = None
        self._labels: Tensor | None = None
        self._measured_at, self._warned = 0, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not callable(getattr(pl_module, "sample", None)):
            raise TypeError(
                f"GenerativeMetrics needs a module that samples, {type(pl_module).__name__} has no method `sample`. "
                "Use DiffusionModule, or write sample(num_samples, condition, *, weights, seed) -> images."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages are there by now, and what representations measure is measured."""
        self._measured_at, self._warned = trainer.global_step, False
        refuse_context(pl_module, "GenerativeMetrics", _WITHOUT_CONTEXT)
        self._check_weights(trainer, pl_module)
        with _random_numbers_kept(pl_module):
            shown = _shows_bars(trainer)
            real = real_images_of(pl_module, trainer.train_dataloader, held_out_loaders(trainer), shown)
            self._load(trainer, pl_module, real)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        step, every = trainer.global_step, self.every_n_steps
        if every is not None and step != self._measured_at and step % every == 0:
            self._measure(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and self.every_n_steps is None and trainer.global_step != self._measured_at:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._measured_at:
            self._measure(trainer, pl_module, after_training=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._ready = self._real = self._labels = None

    def _check_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wanted = [draws.weights or default_weights(pl_module) for draws in self.draws]
        for one in wanted:
            resolve_weights(one, getattr(pl_module, "averages", {}))
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        later = [c for c in callbacks[callbacks.index(self) :] if isinstance(c, EMA)]
        if later and "online" in wanted and self.every_n_steps is None:
            raise ValueError(
                f"{type(later[0]).__name__} is listed after GenerativeMetrics, so its averages would still be in the "
                "module when the online weights are measured after validation: list it before."
            )

    def _load(self, trainer: Trainer, pl_module: LightningModule, real: RealImages) -> None:
        """The first process reads the real images, and fills the cache for the others."""
        failed: str | None = None
        if trainer.is_global_zero:
            try:
                self._ready = get_ready(self.extractor, real, pl_module.device)
                self._real = real_features(self._ready, real)
                self._warn_of_few(trainer)
            except (OSError, ValueError) as error:
                if trainer.world_size == 1:
                    raise
                failed = str(error)
        if failed := trainer.strategy.broadcast(failed):  # or the others would wait for the first
            raise ValueError(failed)
        if not trainer.is_global_zero:
            self._ready = get_ready(self.extractor, real, pl_module.device)
        labels = real.content.labels if trainer.is_global_zero else None
        conditional = bool(getattr(pl_module, "num_classes", 0))
        self._labels = trainer.strategy.broadcast(labels) if conditional else None

    def _warn_of_few(self, trainer: Trainer) -> None:
        said = self._real and few_samples(self._real, self.num_samples)
        if said and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(f"GenerativeMetrics {said}")

    def _measure(self, trainer: Trainer, pl_module: LightningModule, after_training: bool = False) -> None:
        self._measured_at = trainer.global_step
        found: dict[str, float] = {}
        for draws in self.draws:
            found |= self._figures(trainer, pl_module, _quick(draws) if _is_quick(trainer) else draws)
        found = trainer.strategy.broadcast(found)
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
        trainer.callback_metrics.update(values)
        trainer.progress_bar_metrics.update(_short({k: v for k, v in found.items() if "frechet" in k}))
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - after_training
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step)

    def _figures(self, trainer: Trainer, pl_module: LightningModule, draws: Draws) -> dict[str, float]:
        if self._ready is None:
            raise RuntimeError("GenerativeMetrics measures within fit only.")
        with _random_numbers_kept(pl_module):
            features = drawn_features(
                pl_module,
                draws,
                self._ready,
                self._labels,
                share_of(trainer),
                shown=_shows_bars(trainer),
            )
        if self._real is None:
            return {}
        said = diverged(features)
        if said and not self._warned:
            self._warned = True
            rank_zero_warn(f"GenerativeMetrics at step {trainer.global_step}: {said} Training goes on.")
        return logged_names(figures(self._real, features), self.extractor, draws)


def _check_grammar(weights: str | None) -> None:
    if weights is not None and not re.fullmatch(r"online|ema(:.+)?|.+\.safetensors", weights):
        resolve_weights(weights, {})  # says what can be written


def _is_quick(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _quick(draws: Draws) -> Draws:
    return Draws(min(_QUICK, draws.num_samples), draws.weights, draws.sampler, draws.guidance, draws.seed)


def _random_numbers_kept(pl_module: LightningModule) -> Any:
    return torch.random.fork_rng([pl_module.device] if pl_module.device.type == "cuda" else [])


def _shows_bars(trainer: Trainer) -> bool:
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def _short(found: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("metrics/"): value for name, value in found.items()}
