"""The EMA callback and DiffusionModule: published averages, weights-only files, samples."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from foreign import QUIET, checkpointing, same
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import lightning_diffusion as ld
from lightning_diffusion.averaging import averages_in
from lightning_diffusion.callbacks import EMA, PowerFunctionEMA
from lightning_diffusion.profiles import FixedDecay


def module() -> ld.DiffusionModule:
    torch.manual_seed(3)
    network = ld.UNet(
        [1, 4, 4], channels=8, multipliers=[1], num_blocks=1, attention_levels=[], num_classes=2
    )
    return ld.DiffusionModule(network, sampler=ld.Heun(3))


def fit(model: L.LightningModule, *callbacks: L.Callback, ckpt_path=None, **options) -> L.Trainer:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 1, 4, 4, generator=generator) * 2 - 1
    loader = DataLoader(TensorDataset(images, torch.arange(16) % 2), batch_size=4)
    trainer = L.Trainer(
        callbacks=list(callbacks), **(QUIET | {"max_steps": 6, "enable_checkpointing": False} | options)
    )
    trainer.fit(model, loader, loader, ckpt_path=ckpt_path)
    return trainer


def test_averages_are_published_and_sampled_from():
    model, ema = module(), EMA({"slow": FixedDecay(0.9), "fast": FixedDecay(0.1)})
    fit(model, ema)
    assert list(model.averages) == ["slow", "fast"]
    drawn = {w: model.sample(4, weights=w) for w in ("online", "ema", "ema:slow", "ema:fast")}
    assert torch.equal(drawn["ema"], drawn["ema:slow"])
    assert not torch.equal(drawn["online"], drawn["ema"])
    with ema.average_parameters(model, "fast"):
        assert_close(model.sample(4), drawn["ema:fast"])


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_checkpoint_brings_its_averages(tmp_path, weights_only):
    model, ema = module(), PowerFunctionEMA(0.2)
    fit(
        model,
        ema,
        checkpointing(tmp_path, save_weights_only=weights_only),
        max_steps=4,
        enable_checkpointing=True,
    )
    path = next(tmp_path.glob("*.ckpt"))
    saved = torch.load(path, weights_only=True)
    assert same(saved["state_dict"], model.state_dict())
    assert same(averages_in(saved)["ema"], model.averages["ema"])
    loaded = ld.DiffusionModule.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(loaded.sample(2, weights="ema"), model.sample(2, weights="ema"))
    assert torch.equal(loaded.sample(2), model.sample(2))


def test_a_fresh_trainer_validates_a_weights_only_file_with_its_averages(tmp_path):
    class Watching(ld.DiffusionModule):
        def on_validation_epoch_end(self):
            self.seen = {name: p.detach().clone() for name, p in self.averaged_parameters().items()}

    model = module()
    fit(
        model,
        EMA(0.9),
        checkpointing(tmp_path, save_weights_only=True),
        max_steps=4,
        enable_checkpointing=True,
    )
    fresh = Watching(module().network)
    loader = DataLoader(torch.zeros(4, 1, 4, 4), batch_size=4)
    path = next(tmp_path.glob("*.ckpt"))
    L.Trainer(callbacks=[EMA(0.9)], **QUIET).validate(fresh, loader, ckpt_path=path, verbose=False)
    assert same(fresh.seen, model.averages["ema"])
    assert same(fresh.state_dict(), model.state_dict())


def test_resuming_changes_nothing(tmp_path):
    straight, resumed, a, b = module(), module(), PowerFunctionEMA(0.2), PowerFunctionEMA(0.2)
    fit(straight, a, max_steps=8)
    fit(module(), PowerFunctionEMA(0.2), checkpointing(tmp_path), max_steps=4, enable_checkpointing=True)
    fit(resumed, b, max_steps=8, ckpt_path=next(tmp_path.glob("*.ckpt")))
    assert same(resumed.state_dict(), straight.state_dict())
    assert same(resumed.averages["ema"], straight.averages["ema"])
    assert torch.equal(resumed.sample(2, weights="ema"), straight.sample(2, weights="ema"))
