"""NoiseLevelMonitor measures what it says, changes nothing, waits for nothing, and goes on where it stopped."""

from __future__ import annotations

import math
from typing import ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from foreign import QUIET, Classifier, points
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from small_module import fit, module
from sync_counter import SyncCounter
from torch import nn
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.callbacks import NoiseLevelMonitor
from lightning_diffusion.datamodules import GaussianMixtureDataModule
from lightning_diffusion.objective import Report


def monitor(**arguments):
    return NoiseLevelMonitor(**{"low": -4.0, "high": 8.0, "bins": 6, **arguments})


def last(watching):
    return watching._statistics.record() if not watching.history.records else watching.history.records[-1]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"plugins": ["16-mixed"]}], ids=str)
def test_gradients_are_those_of_each_samples_own_loss(options, tmp_path):
    """Loss |F - R|^2 / D, so gradient 2 (F - R) / D and |g|^2 = 4 loss / D: the two are measured independently."""
    options = {k: [ld.DiffusionPrecision(p) for p in v] if k == "plugins" else v for k, v in options.items()}
    watching = monitor()
    fit(module(), callbacks=[watching], steps=4, default_root_dir=tmp_path, limit_val_batches=0, **options)
    record = last(watching)
    assert record.draws == 4 * 16 * options.get("accumulate_grad_batches", 1)
    known = record.counts > 0
    tolerance = 5e-3 if "plugins" in options else 1e-5
    assert_close(record.gradient_norm[known].square(), 4 / 64 * record.loss[known], rtol=tolerance, atol=0)


def still(**arguments):
    """A module whose network puts out 0 and stays so."""
    network = ld.UNet((1, 1, 2), channels=4, multipliers=(1,), num_blocks=1, attention_levels=())
    optimizer = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    settings = {"representation": ld.Identity(bounded=False), "optimizer": optimizer, **arguments}
    return ld.DiffusionModule(network, ld.EDM(sigma_data=0.5), **settings)


def mixture_run(mixture, tmp_path, **arguments):
    data = GaussianMixtureDataModule(mixture, batch_size=256, image_shape=(1, 1, 2))
    watching = monitor()
    fit(
        still(**arguments),
        data,
        steps=20,
        callbacks=[watching],
        default_root_dir=tmp_path,
        limit_val_batches=0,
    )
    return last(watching)


def test_the_best_denoiser_is_at_one_everywhere(tmp_path):
    """For one Gaussian the network 0 is the exact denoiser under EDM: both ratios are 1, there is no signal."""
    record = mixture_run(ld.GaussianMixture([1.0], [[0.0, 0.0]], [0.5]), tmp_path)
    usual = record.counts > 50
    error = 4 * (record.loss_variance / record.counts).sqrt()[usual]
    assert ((record.over(0) - 1).abs()[usual] < error + 0.05).all(), "variances are measured on 4096 samples"
    assert ((record.over(1) - 1).abs()[usual] < error).all()
    assert (record.gradient_snr.abs()[usual] < 0.05).all()


def test_a_floor_lies_below_what_is_linear(tmp_path):
    mixture = ld.GaussianMixture([0.5, 0.5], [[-0.5, 0.0], [0.5, 0.0]], [0.05, 0.05])
    record = mixture_run(mixture, tmp_path)
    ratio = record.over(1)[2:6] / record.over(0)[2:6]
    assert ratio.min() > 0.95
    assert ratio.max() > 2


def test_stable_targets_have_no_floor(tmp_path):
    data = GaussianMixtureDataModule(ld.GaussianMixture([1.0], [[0.0, 0.0]], [0.5]), 16, (1, 1, 2))
    watching, steady = monitor(), still()
    steady.objective.stable_target = ld.StableTarget()
    fit(steady, data, callbacks=[watching], default_root_dir=tmp_path, limit_val_batches=0)
    assert last(watching).sums.shape[1] == 8


class Capture(DummyLogger):
    """Curves that reach the loggers, by the number of batches before."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("levels/") for name in metrics):
            self.seen[step + 1] = metrics


def run(folder, steps, resume=None):
    """Logs every 4 steps; a checkpoint after 6, in the midst of a window."""
    L.seed_everything(3, verbose=False)
    watching, capture = monitor(), Capture()
    trainer = fit_from(folder, steps, [watching], resume, logger=capture)
    return watching, capture, trainer


def fit_from(folder, steps, callbacks, resume, **options):
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": False, "log_every_n_steps": 4, "limit_val_batches": 0, **options},
        max_steps=steps, callbacks=callbacks, default_root_dir=folder,
    )  # fmt: skip
    data = ld_digits()
    trainer.fit(module(), datamodule=data, ckpt_path=resume)
    return trainer


def ld_digits():
    from lightning_diffusion.datamodules import DigitsDataModule

    return DigitsDataModule(batch_size=16)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return *run(folder, 12), folder


def test_going_on_in_the_midst_of_a_window_changes_no_curve(straight, tmp_path):
    watching, capture, _, _ = straight
    _, _, half = run(tmp_path / "a", 6)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, seen, _ = run(tmp_path / "b", 12, tmp_path / "half.ckpt")
    assert capture.seen[8] == seen.seen[8]
    assert capture.seen[12] == seen.seen[12]
    assert resumed.history.steps[-1] == watching.history.steps[-1] == (8, 12)
    assert torch.equal(last(resumed).sums, last(watching).sums)
    assert torch.equal(resumed._measured.variances, watching._measured.variances)


def test_other_bins_begin_a_history_of_their_own(straight, tmp_path):
    _, _, trainer, _ = straight
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    other = monitor(bins=3)
    fit_from(tmp_path, 16, [other], tmp_path / "all.ckpt")
    assert other.history.steps == [(12, 16)]


def test_it_only_looks(straight, tmp_path):
    _, _, watched, _ = straight
    L.seed_everything(3, verbose=False)
    plain = fit_from(tmp_path, 12, [], None)
    pairs = zip(watched.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not watched.model.network._forward_hooks


def test_curves_are_named_by_their_bins(straight):
    watching, capture, _, _ = straight
    names = capture.seen[12].keys()
    series = {name.split("/")[1] for name in names}
    assert series == {
        "share", "loss", "loss_variance", "gradient_norm", "gradient_snr", "loss_over_linear"
    }  # fmt: skip
    assert {name.split("/")[2] for name in names} <= set(watching.bins.names)
    shares = [value for name, value in capture.seen[12].items() if name.startswith("levels/share/")]
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert all(math.isfinite(value) for value in capture.seen[12].values())


def test_the_picture_lies_in_the_run_folder_and_shows_something(straight):
    folder = straight[3]
    (file,) = folder.rglob("noise_levels/*.png")
    assert file.name == "step=000012.png"
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert pixels.std() > 20
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_nothing_waits_for_the_device_between_logging_steps():
    class Count(Callback):
        """Wraps the hooks of the monitor and the whole step."""

        counted: ClassVar = []

        def on_train_batch_start(self, *_):
            self.counter = SyncCounter().__enter__()

        def on_train_batch_end(self, *_):
            self.counter.__exit__(None, None, None)
            self.counted.append(self.counter.ours)

    fit(module(), steps=40, log_every_n_steps=35, callbacks=[monitor(), Count()], limit_val_batches=0)
    quiet = [calls for step, calls in enumerate(Count.counted) if step and (step + 1) % 35]
    assert len(quiet) == 38
    assert quiet == [[]] * 38


class Reporting(Classifier):
    """A foreign project that offers a report, and has no attribute `network`."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        level = ld.NoiseLevel(torch.full((len(batch[0]),), 0.6), torch.full((len(batch[0]),), 0.8))
        self.report = Report(loss.detach(), loss.detach().expand(len(batch[0])), level)
        return loss

    report = None


def test_any_module_with_a_report_is_watched(tmp_path):
    watching = monitor()
    trainer = L.Trainer(**QUIET, max_steps=4, callbacks=[watching], default_root_dir=tmp_path)
    trainer.fit(Reporting(), points())
    record = last(watching)
    assert record.counts.tolist() == [0, 0, 16, 0, 0, 0, 0, 0]
    assert record.gradient_norm.isnan().all()
    assert list((tmp_path / "noise_levels").iterdir())


def test_a_network_that_is_called_twice_has_no_gradients():
    class Twice(nn.Module):
        num_classes, image_shape = 0, (1, 8, 8)

        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(1, 1, 1)

        def forward(self, x, c_noise):
            return self.inner(x)

    class Conditioned(ld.DiffusionModule):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return super().training_step(batch, batch_idx) + 0 * self.network(batch["image"], None).sum()

    watching = monitor()
    fit(Conditioned(Twice(), label_dropout=1.0), callbacks=[watching], limit_val_batches=0)
    assert last(watching).gradient_norm.isnan().all()


def test_a_module_without_a_report_is_refused_in_one_line():
    with pytest.raises(TypeError, match=r"Classifier has no `report`\. Use DiffusionModule") as refused:
        L.Trainer(**QUIET, max_steps=1, callbacks=[monitor()]).fit(Classifier(), points())
    assert "\n" not in str(refused.value)


def test_a_report_of_another_kind_is_refused():
    class Wrong(Reporting):
        def training_step(self, batch, batch_idx):
            self.report = {"loss": 1.0}
            return self.loss(batch)

    with pytest.raises(
        TypeError, match=r"Wrong\.report = dict; expected a .*Report\(loss, per_sample, level\)"
    ):
        L.Trainer(**QUIET, max_steps=1, callbacks=[monitor()]).fit(Wrong(), points())


def test_no_picture_is_no_number_of_steps():
    with pytest.raises(ValueError, match="picture_every_n_steps=0; expected 1 or more"):
        NoiseLevelMonitor(picture_every_n_steps=0)
