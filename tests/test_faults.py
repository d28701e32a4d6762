"""Transient faults cost a guarded run next to nothing, and undisturbed runs never notice the guard."""

from __future__ import annotations

from statistics import median

import lightning as L
import pytest
import torch
from foreign import QUIET
from small_module import fit, module
from torch import nn

import lightning_diffusion as ld
from lightning_diffusion.analysis.information import GaussianMixture
from lightning_diffusion.callbacks import EMA, SpikeGuard
from lightning_diffusion.datamodules import GaussianMixtureDataModule

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:SpikeGuard. Step")]
STEPS, FIRST = 600, 303
MIXTURE = GaussianMixture(torch.full((4,), 0.25), 0.45 * torch.eye(4, 2), torch.full((4,), 0.2))


class Net(nn.Module):
    """Two hidden layers; the noise level is a third coordinate."""

    image_shape, num_classes = (2,), 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x, c_noise):
        return self.layers(torch.cat([x, c_noise[:, None]], 1))


class NaNInABatch(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, _):
        if trainer.global_step == FIRST:
            batch["image"][0] = torch.nan


class Outlier(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, _):
        if trainer.global_step == FIRST:
            batch["image"].mul_(1e6)


class HotRate(L.Callback):
    """Thirty times too high for twenty steps."""

    def on_train_batch_start(self, trainer, pl_module, batch, _):
        factor = 30.0 if FIRST <= trainer.global_step < FIRST + 20 else 1.0
        (rate,) = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()
        trainer.optimizers[0].param_groups[0]["lr"] = rate * factor


def train(seed, *callbacks):
    """Validation loss of the averaged weights."""
    L.seed_everything(seed, verbose=False)
    representation = ld.Standardize([0.0], [0.4])
    representation.bounded = False
    model = ld.DiffusionModule(
        Net(),
        representation=representation,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        learning_rate=ld.WarmupCosine(),
    )
    data = GaussianMixtureDataModule(MIXTURE, 64, labels=False, held_out=2048)
    options = QUIET | {"max_steps": STEPS, "enable_checkpointing": False, "limit_val_batches": 0}
    trainer = L.Trainer(callbacks=[EMA(0.98), *callbacks], **options)
    trainer.fit(model, datamodule=data)
    trainer.limit_val_batches = 1.0
    return trainer.validate(model, datamodule=data, verbose=False)[0]["val/loss"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        guards = [SpikeGuard() for _ in range(3)]
        losses = [train(seed, guard) for seed, guard in enumerate(guards)]
        assert [guard.spikes for guard in guards] == [0, 0, 0]
        assert losses[0] == train(0)
        return losses


@pytest.mark.parametrize("fault", [NaNInABatch, Outlier, HotRate])
def test_a_guarded_run_ends_where_the_undisturbed_one_does(undisturbed, fault, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    guards = [SpikeGuard() for _ in range(3)]
    losses = [train(seed, fault(), guard) for seed, guard in enumerate(guards)]
    assert all(guard.spikes for guard in guards)
    assert all(guard.rollbacks == 0 for guard in guards) or fault is HotRate
    assert median(a / b for a, b in zip(losses, undisturbed, strict=True)) < 1.05


@pytest.mark.parametrize("fault", [NaNInABatch, HotRate])
def test_without_a_guard_it_does_not(undisturbed, fault, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    assert not train(0, fault()) < 1.05 * undisturbed[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_undisturbed_digits_never_trigger(seed, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    guard = SpikeGuard()
    fit(module(), steps=150, callbacks=[guard], limit_val_batches=0)
    assert guard.events == []
