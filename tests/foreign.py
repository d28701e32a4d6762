"""A project that is not ours: a classifier on Lightning, to which callbacks are given."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

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
