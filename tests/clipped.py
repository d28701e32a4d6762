"""What tests of clipping train, and what they look at."""

from __future__ import annotations

import lightning as L
import torch
from foreign import Classifier
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

BOUND = 0.05


class Adam(Classifier):
    """With a fused optimizer on request; batches can overflow float16."""

    def __init__(self, fused=False, overflows=()):
        super().__init__()
        self.fused, self.overflows = fused, overflows

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1e8 if batch_idx in self.overflows else 1)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0, fused=self.fused)


class Watch(L.Callback):
    """Norms of the gradients that the optimizer uses, true ones, at every step."""

    def __init__(self):
        self.norms, self.logged = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in held(optimizer)])))

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({k: float(v) for k, v in trainer.logged_metrics.items() if "train/" in k})


def held(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def float16(initial=2.0**10, growth=2):
    scaler = torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=growth)
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler)
