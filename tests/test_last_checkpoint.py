"""The last checkpoint of a run that ended is one from which a longer run goes on as if it had not."""

import lightning
import pytest
import torch

import lightning_diffusion as ld
from lightning_diffusion.callbacks import EMA, LastCheckpoint
from lightning_diffusion.datamodules import DigitsDataModule


def fit(folder, checkpoint=None, resume=None, **limits):
    lightning.seed_everything(0, verbose=False)
    network = ld.UNet((1, 8, 8), channels=8, num_blocks=1, num_classes=10)
    module, average = ld.DiffusionModule(network), EMA(decay=0.5)
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[checkpoint or LastCheckpoint(), average],
        default_root_dir=folder,
        limit_train_batches=4,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=4), ckpt_path=resume)
    return trainer, module


@pytest.fixture(autouse=True)
def no_seed_left(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


LIMITS = [
    ({"max_steps": 6}, {"max_steps": 11}),
    ({"max_epochs": 2}, {"max_epochs": 3}),
    ({"max_steps": 8}, {"max_steps": 9}),
]


@pytest.mark.parametrize(("first", "then"), LIMITS, ids=str)
def test_a_longer_run_goes_on_exactly(tmp_path, first, then):
    fit(tmp_path / "short", **first)
    resumed, module = fit(tmp_path / "long", resume=last(tmp_path / "short"), **then)
    straight, expected = fit(tmp_path / "straight", **then)
    assert resumed.global_step == straight.global_step
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    for name, value in expected.averages["ema"].items():
        assert torch.equal(module.averages["ema"][name], value), name


@pytest.mark.parametrize(("limits", "steps"), [({"max_steps": 5}, 5), ({"max_epochs": 1}, 4)], ids=str)
def test_the_end_is_saved_once_and_alone(tmp_path, monkeypatch, limits, steps):
    saved = []
    save = lightning.Trainer.save_checkpoint
    monkeypatch.setattr(
        lightning.Trainer,
        "save_checkpoint",
        lambda self, *a, **k: (saved.append(self.global_step), save(self, *a, **k)),
    )
    fit(tmp_path, LastCheckpoint(every_n_steps=2), **limits)
    assert saved == [*range(2, steps, 2), steps]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == steps


def test_a_run_that_another_callback_ends_is_saved(tmp_path):
    class Enough(LastCheckpoint):
        def on_train_batch_start(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 2

    trainer, _ = fit(tmp_path, Enough(), max_steps=9)
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == trainer.global_step < 9


def test_a_step_count_below_one_is_refused():
    with pytest.raises(ValueError, match="found every_n_steps=0, expected 1 or more"):
        LastCheckpoint(every_n_steps=0)
