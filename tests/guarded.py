"""What tests of the guard train: a regression in a foreign project, on a list of batches, some of them spoilt."""

from __future__ import annotations

import lightning as L
import torch
from foreign import QUIET
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_diffusion.callbacks import EMA
from lightning_diffusion.spikes import SpikeRule

EAGER = SpikeRule(history=8)


class Regression(L.LightningModule):
    """Batch norm, and a learning rate that falls with every step."""

    def __init__(self, fused: bool = True, optimizer: type = torch.optim.AdamW) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.fused, self.optimizer = fused, optimizer

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.body(batch["x"]).float(), batch["y"])

    def configure_optimizers(self):
        momentum = {"momentum": 0.9} if self.optimizer is torch.optim.SGD else {}
        optimizer = self.optimizer(self.parameters(), lr=1e-2, fused=self.fused, **momentum)
        schedule = LambdaLR(optimizer, lambda step: 0.97**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Poison(L.Callback):
    """Weights a thousand times too large from the end of one step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.body[3].weight.mul_(1e3)


def batches(count: int = 60, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of 16 samples that are numbered."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, 3, generator=generator)
    y = x.sum(-1, keepdim=True) + 0.3 * torch.randn(count, 16, 1, generator=generator)
    index = torch.arange(count * 16).view(count, 16)
    return [{"x": x[i], "y": y[i], "index": index[i]} for i in range(count)]


def spoilt(data, *places, by=torch.nan):
    """The same with a sample of some batches, times a number."""
    return [
        {**b, "y": b["y"] * torch.tensor([by] + [1.0] * 15)[:, None]} if i in places else b
        for i, b in enumerate(data)
    ]


def train(module, data, *callbacks, **options) -> L.Trainer:
    """Once over the batches, in their order."""
    ckpt_path = options.pop("ckpt_path", None)
    settings = QUIET | {"max_epochs": 1, "enable_checkpointing": False, "log_every_n_steps": 1} | options
    trainer = L.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def everything(trainer: L.Trainer) -> dict[str, object]:
    """Weights and buffers, momenta, learning rates, averages: what a step changes."""
    optimizer = trainer.optimizers[0].state_dict()
    emas = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]
    return {
        "weights": {k: v.clone() for k, v in trainer.lightning_module.state_dict().items()},
        "optimizer": optimizer["state"],
        "rates": [group["lr"] for group in optimizer["param_groups"]],
        "schedule": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
        "averages": [ema.state_dict()["averages"] for ema in emas],
    }


def assert_same(found, expected) -> None:
    """Bit for bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=False)
