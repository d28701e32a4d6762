"""A project that is not ours: a classifier on Lightning, to which callbacks are given; what tests ask of it."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_diffusion.callbacks import EMA

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def points(count: int = 24, batch: int = 4) -> DataLoader:
    """Points and classes, in a fixed order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=batch)


class Classifier(L.LightningModule):
    """Batch norm, a frozen layer, a shared weight; notes which weights it is evaluated with."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5))
            self.head = nn.Linear(5, 2)
            self.frozen = nn.Linear(2, 2)
        self.body[3].weight = self.body[0].weight
        self.frozen.requires_grad_(False)
        self.seen: list[torch.Tensor] = []

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(self.frozen(self.head(self.body(batch[0]))), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.seen.append(self.head.weight.detach().clone())
        self.log("val/loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.head.weight.detach().clone()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def fit(module: L.LightningModule, *callbacks: L.Callback, loader: DataLoader | None = None, **options):
    """Train without a word; returns the Trainer."""
    ckpt_path = options.pop("ckpt_path", None)
    settings = QUIET | {"max_steps": 8, "enable_checkpointing": False} | options
    trainer = L.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, loader or points(), points(8), ckpt_path=ckpt_path)
    return trainer


class NaiveEMA(L.Callback):
    """The definition, written as a loop over tensors, after every batch that moved the weights."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay, self.steps = decay, 0

    def on_fit_start(self, trainer, pl_module) -> None:
        self.average = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        self.last = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        now = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        if any(not torch.equal(now[n], self.last[n]) for n in self.average):
            self.steps += 1
            for name, average in self.average.items():
                average.mul_(self.decay).add_(now[name], alpha=1 - self.decay)
        self.last = now


def online(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def averages(ema: EMA, name: str = "ema") -> dict[str, torch.Tensor]:
    return ema.state_dict()["averages"][name]


def checkpointing(path, **options) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=path, filename="{step}", save_top_k=-1, **options)
