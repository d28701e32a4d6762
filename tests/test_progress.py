"""The progress of a run is told in time, with its loss, and costs no look at the device in between."""

import re
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_diffusion.callbacks import TrainingProgress


class Logging(BoringModel):
    def training_step(self, batch, batch_idx):
        self.log("train/loss", torch.tensor(0.25), prog_bar=True)
        return super().training_step(batch, batch_idx)


def fit(progress, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=12,
        callbacks=[progress],
        logger=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(Logging(), DataLoader(torch.randn(20, 32), batch_size=4))
    return trainer


@pytest.fixture
def looks(monkeypatch):
    """How often the metrics were asked for."""
    asked, get = [], lightning.Trainer.progress_bar_metrics.fget
    monkeypatch.setattr(
        lightning.Trainer,
        "progress_bar_metrics",
        property(lambda self: (asked.append(self.global_step), get(self))[1]),
    )
    return asked


def test_lines_say_step_loss_and_speed(capfd):
    fit(TrainingProgress(line_seconds=0.0), enable_model_summary=False)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step")]
    assert len(lines) == 12
    assert re.fullmatch(r"step 6/12  train/loss 0\.25  [\d,]+ images/s  0:00:\d\d left", lines[5])
    assert re.fullmatch(r"step 12/12  train/loss 0\.25  [\d,]+ images/s", lines[11])


def test_the_device_is_looked_at_only_when_something_is_shown(capfd, looks):
    fit(TrainingProgress(line_seconds=1e9), enable_model_summary=False)
    assert looks == [12]
    assert capfd.readouterr().err.count("step 12/12") == 1


def test_images_of_all_batches_are_counted(capfd, monkeypatch):
    clock = iter(range(10_000))
    ticking = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr("lightning_diffusion.callbacks.progress.time", ticking)
    fit(TrainingProgress(line_seconds=1e9), enable_model_summary=False)
    (last,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step")]
    images_per_second = int(re.search(r"(\d+) images/s", last)[1])
    assert images_per_second == round(12 * 4 / 13)


def test_a_terminal_gets_a_bar(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    fit(TrainingProgress(bar_seconds=0.0), enable_model_summary=False)
    assert "━" in capfd.readouterr().err


def test_evaluation_has_its_own(capfd):
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[TrainingProgress(line_seconds=0.0)],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.validate(Logging(), DataLoader(torch.randn(12, 32), batch_size=4), verbose=False)
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("batch")][-1].startswith(
        "batch 3/3"
    )
