"""What does a fault in the midst of a training cost, with and without SpikeGuard?

    OMP_NUM_THREADS=1 python benchmarks/faults.py [--steps 800] [--seeds 3]

A perceptron learns the digits, three seeds. Each fault strikes a plain and a guarded run at the same step; the
validation loss of the averaged weights at the end, on always the same levels and noise, is divided by that of the
undisturbed run of the same seed. Median, lowest and highest over seeds; `no fault` in the first column is the guarded
run without one, and how far undisturbed runs of other seeds are apart is said below. Steps skipped and times that
weights were put back are those of all seeds.

Under the faults of float16 plain is Lightning's own float16 plugin with torch's scaler, guarded is DiffusionPrecision
with LossScaleMonitor and SpikeGuard.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn
from torch.nn.functional import silu

from lightning_diffusion import DiffusionModule, DiffusionPrecision, Standardize, WarmupCosine
from lightning_diffusion.callbacks import EMA, LossScaleMonitor, SpikeGuard
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.networks.embeddings import NoiseEmbedding

RATE, HOT, LASTS = 2e-3, 30.0, 20


class Fault(Callback):
    """Nothing, from step `first` on.

    Args:
        first: the step that it strikes; data are checked in logging steps, which are to be avoided.
    """

    def __init__(self, first: int) -> None:
        self.first = first


class NaNInABatch(Fault):
    """One image of one batch is not a number."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, _: int) -> None:
        if trainer.global_step == self.first:
            batch["image"][0] = torch.nan


class OutlierBatch(Fault):
    """One batch is a million times too large."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, _: int) -> None:
        if trainer.global_step == self.first:
            batch["image"].mul_(1e6)


class HotRate(Fault):
    """The learning rate is 30 times too high for 20 steps."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, _: int) -> None:
        factor = HOT if self.first <= trainer.global_step < self.first + LASTS else 1.0
        (scheduler,) = (config.scheduler for config in trainer.lr_scheduler_configs)
        for group, rate in zip(trainer.optimizers[0].param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate * factor


class InFloat16(Fault):
    """One layer's output is multiplied by `factor` for 20 steps, in float16."""

    factor = 1.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, _: int) -> None:
        if trainer.global_step == self.first:
            self.left = LASTS
            self.handle = pl_module.network.hidden.register_forward_hook(lambda m, x, y: y * self.factor)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if hasattr(self, "left"):
            self.left -= 1
            if self.left == 0:
                self.handle.remove()


class Overflow(InFloat16):
    """Activations beyond float16's largest number."""

    factor = 1e6


class Underflow(InFloat16):
    """Activations below float16's smallest."""

    factor = 1e-9


class Perceptron(nn.Module):
    """Two hidden layers with a norm between them."""

    image_shape = (1, 8, 8)

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.noise, self.embedding = NoiseEmbedding(32), nn.Linear(32, width)
        self.stem, self.hidden, self.norm = nn.Linear(64, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 64)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        h = self.stem(x.flatten(1)) + self.embedding(self.noise(c_noise))
        h = h + silu(self.norm(self.hidden(silu(h))))
        return self.head(h).view_as(x)


FAULTS: dict[str, type[Fault]] = {
    "no fault": Fault,
    "NaN in a batch": NaNInABatch,
    "batch times 1e6": OutlierBatch,
    "rate times 30 for 20 steps": HotRate,
    "float16, no fault": InFloat16,
    "float16 overflows in one layer for 20 steps": Overflow,
    "activations underflow in float16 for 20 steps": Underflow,
}


class End(NamedTuple):
    """Validation loss at the end, steps skipped, times that weights were put back."""

    loss: float
    skipped: int = 0
    rollbacks: int = 0


def train(seed: int, steps: int, fault: Fault, *callbacks: Callback, guarded: bool = False) -> float:
    """Validation loss of the averaged weights after so many steps."""
    seed_everything(seed, verbose=False)
    half = isinstance(fault, InFloat16)
    module = DiffusionModule(
        Perceptron(),
        representation=Standardize(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=RATE, fused=True),
        learning_rate=WarmupCosine(),
        label_dropout=1.0,
    )
    trainer = Trainer(
        accelerator="cpu",
        plugins=[float16(guarded)] if half else None,
        max_steps=steps,
        callbacks=[EMA(0.99), fault, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    data = DigitsDataModule(batch_size=64)
    trainer.fit(module, datamodule=data)
    trainer.limit_val_batches = 1.0
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    return found["val/loss"]


def float16(guarded: bool) -> Precision:
    """Ours, or what Lightning has."""
    if guarded:
        return DiffusionPrecision("16-mixed")
    return MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))


def plain(seed: int, steps: int, fault: Fault) -> End:
    return End(train(seed, steps, fault))


def guarded(seed: int, steps: int, fault: Fault) -> End:
    guard = SpikeGuard()
    monitor = [LossScaleMonitor()] if isinstance(fault, InFloat16) else []
    return End(train(seed, steps, fault, *monitor, guard, guarded=True), guard.spikes, guard.rollbacks)


def told(ends: list[End], undisturbed: list[float]) -> str:
    """Ratios to undisturbed runs of the same seeds."""
    ratios = [end.loss / loss for end, loss in zip(ends, undisturbed, strict=True)]
    return f"{median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seeds, steps, first = range(options.seeds), options.steps, options.steps // 2 + 3
    undisturbed = {
        base: [plain(seed, steps, base(first)).loss for seed in seeds] for base in (Fault, InFloat16)
    }
    print("| fault | plain | guarded | steps skipped | put back |\n|---|---|---|---|---|")
    for name, make in FAULTS.items():
        base = InFloat16 if issubclass(make, InFloat16) else Fault
        without = [plain(seed, steps, make(first)) for seed in seeds] if make is not base else []
        ends = [guarded(seed, steps, make(first)) for seed in seeds]
        skipped, rollbacks = sum(end.skipped for end in ends), sum(end.rollbacks for end in ends)
        bare = told(without, undisturbed[base]) if without else "1"
        print(f"| {name} | {bare} | {told(ends, undisturbed[base])} | {skipped} | {rollbacks} |", flush=True)
    for base, losses in undisturbed.items():
        apart = ", ".join(f"{loss / median(losses):.3f}" for loss in losses)
        kind = "in float16" if base is InFloat16 else "in float32"
        print(f"Undisturbed {kind}: losses of the seeds over their median, {median(losses):.4f}: {apart}.")


if __name__ == "__main__":
    main()
