"""DiffusionModule on real digits: what it trains on, logs, saves, refuses, and never waits for."""

import json
from typing import ClassVar

import lightning as L
import pytest
import torch
from foreign import QUIET
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from small_module import fit, module, network
from sync_counter import SyncCounter
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import lightning_diffusion as ld
import lightning_diffusion.batches
from lightning_diffusion.callbacks import EMA
from lightning_diffusion.datamodules import DigitsDataModule


def loader(*tensors):
    data = TensorDataset(*tensors) if len(tensors) > 1 else tensors[0]
    return DataLoader(data, batch_size=4)


IMAGES, LABELS = torch.linspace(-1, 1, 512).reshape(8, 1, 8, 8), torch.arange(8)


@pytest.mark.parametrize(
    "batches",
    [
        loader(IMAGES),
        loader(IMAGES, LABELS),
        DataLoader([{"image": i, "label": n} for n, i in enumerate(IMAGES)], 4),
    ],
    ids=["x", "pair", "dict"],
)
def test_batches_may_be_images_pairs_or_dicts(batches):
    model = module()
    L.Trainer(**{**QUIET, "max_steps": 2, "enable_checkpointing": False}).fit(model, batches)
    assert model.report.loss.isfinite()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "Found a batch of str"),
        ({"picture": IMAGES}, r"keys \['picture'\]"),
        ((IMAGES, LABELS, LABELS), r"tuple of 3 \(Tensor, Tensor, Tensor\)"),
    ],
)
def test_other_batches_are_refused_by_name(batch, message):
    with pytest.raises(TypeError, match=message):
        ld.batches.unpack(batch)


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (loader(IMAGES * 127.5 + 127.5), {}, r"expected -1\.\.1: divide by 127\.5 and subtract 1"),
        (loader(IMAGES.repeat(1, 1, 2, 2)), {}, r"\(1, 16, 16\).*\(1, 8, 8\)"),
        (loader(IMAGES.clone().fill_(torch.nan)), {}, "(?i)nan"),
        (loader(IMAGES, LABELS + 5), {}, "12"),
        (loader(IMAGES, LABELS), {"network": network(num_classes=0)}, r"num_classes.*label_dropout: 1.0"),
    ],
    ids=["range", "size", "nan", "labels", "no classes"],
)
def test_bad_data_are_refused_on_the_first_batch(data, model, message):
    with pytest.raises(ValueError, match=message):
        L.Trainer(**{**QUIET, "max_steps": 2, "enable_checkpointing": False}).fit(
            module(representation=ld.Identity(), **model), data
        )


def test_labels_may_be_left_unused_on_purpose():
    model = module(network=network(num_classes=0), label_dropout=1.0)
    fit(model)
    assert model.sample(2).shape == (2, 1, 8, 8)


def test_label_dropout_replaces_its_share_by_the_null_label():
    seen = []

    class Watching(ld.UNet):
        def forward(self, x, c_noise, label=None):
            seen.append(label)
            return super().forward(x, c_noise, label)

    watching = Watching(
        (1, 8, 8), channels=8, num_blocks=1, multipliers=(1,), attention_levels=(), num_classes=10
    )
    fit(module(network=watching, label_dropout=0.3), steps=100, max_epochs=-1, limit_val_batches=0)
    labels = torch.cat(seen)
    assert (labels == 10).float().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 1600) ** 0.5)


def test_report_covers_all_micro_batches_of_the_step():
    class Reader(Callback):
        sizes: ClassVar = []

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.sizes.append(len(pl_module.report.per_sample))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            report = pl_module.report
            assert len(report.per_sample) == len(report.level.sigma) == 16 * (batch_idx % 3 + 1)
            assert_close(report.loss, report.per_sample.mean())
            assert not report.loss.requires_grad

    reader = Reader()
    fit(module(), steps=3, accumulate_grad_batches=3, callbacks=[reader])
    assert reader.sizes == [16, 16, 16]


def test_logged_loss_is_the_mean_since_the_last_logging_step(tmp_path):
    losses = []

    class Collect(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    fit(module(), steps=6, logger=CSVLogger(tmp_path), log_every_n_steps=3, callbacks=[Collect()])
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    logged = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert logged == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-5)


def test_no_host_synchronisation_of_ours_between_logging_steps():
    class Count(Callback):
        counted: ClassVar = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.counter = SyncCounter().__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.counter.__exit__(None, None, None)
            self.counted.append(self.counter.ours)

    count = Count()
    fit(module(), steps=9, log_every_n_steps=4, callbacks=[EMA(0.9), count], limit_val_batches=0)
    quiet = [calls for step, calls in enumerate(count.counted) if step and (step + 1) % 4]
    assert len(quiet) == 6
    assert quiet == [[]] * 6


def test_validation_is_the_same_in_every_epoch_and_run():
    """With a learning rate of zero nothing but the validation's own draws could change."""
    values = []

    class Collect(Callback):
        def on_validation_end(self, trainer, pl_module):
            values.append(trainer.callback_metrics["val/loss"].item())

    for seed in (1, 2):
        L.seed_everything(seed)
        optimizer = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
        fit(
            module(optimizer=optimizer, representation=ld.Identity()),
            steps=-1,
            max_epochs=2,
            callbacks=[Collect()],
            limit_train_batches=2,
        )
    assert len(values) == 4
    assert len(set(values)) == 1


def test_standardisation_is_measured_once_on_training_data_and_saved(tmp_path):
    data = DigitsDataModule(batch_size=16)
    model = module()
    trainer = fit(model, data)
    pixels = torch.cat([batch["image"] for batch in data.train_dataloader()])
    assert model.representation.mean.item() == pytest.approx(pixels.mean().item(), abs=0.01)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = ld.DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(again.sample(3, seed=4), model.sample(3, seed=4))


def test_checkpoint_loads_without_arguments_with_all_parts(tmp_path):
    model = module(
        objective=ld.EDM(sigma_data=1.0, density=ld.LogNormalSigma(-0.5, 1.0)),
        representation=ld.Standardize(sigma_data=1.0),
        sampler=ld.DDIM(5),
        label_dropout=0.25,
    )
    fit(model).save_checkpoint(tmp_path / "a.ckpt")
    again = ld.DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.objective.density == ld.LogNormalSigma(-0.5, 1.0)
    assert again.objective.sigma_data == 1.0
    assert again.sampler == ld.DDIM(5)
    assert again.label_dropout == 0.25
    assert json.dumps(dict(again.hparams))
    assert torch.equal(again.sample(2), model.sample(2))


def test_a_foreign_network_trains_and_is_asked_for_when_loading(tmp_path):
    class Foreign(nn.Module):
        image_shape = (1, 8, 8)

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x, c_noise):
            return self.conv(x)

    model = module(network=Foreign(), label_dropout=1.0)
    fit(model).save_checkpoint(tmp_path / "a.ckpt")
    again = ld.DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt", network=Foreign())
    assert torch.equal(again.sample(2), model.sample(2))
    with pytest.raises(Exception, match="network"):
        ld.DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("weights_only", [False, True])
def test_averages_travel_in_every_kind_of_checkpoint(tmp_path, weights_only):
    model, ema = module(), EMA(0.5)
    fit(model, callbacks=[ema]).save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    again = ld.DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
    averaged = again.sample(2, weights="ema")
    assert torch.equal(averaged, model.sample(2, weights="ema"))
    assert torch.equal(again.sample(2), model.sample(2))
    assert not torch.equal(averaged, again.sample(2))
    with ema.average_parameters(model):
        assert torch.equal(averaged, model.sample(2))


def test_configured_optimizer_wins_over_the_checkpoint_and_resumes_the_schedule(tmp_path):
    def trained(lr, steps, **arguments):
        model = module(
            optimizer=lambda p: torch.optim.AdamW(p, lr=lr, fused=True), learning_rate=ld.WarmupLinear(2)
        )
        trainer = L.Trainer(**{**QUIET, "max_steps": steps, "enable_checkpointing": False})
        trainer.fit(model, datamodule=DigitsDataModule(batch_size=16), **arguments)
        return trainer

    trained(1e-3, 5).save_checkpoint(tmp_path / "a.ckpt")
    resumed = trained(5e-4, 10, ckpt_path=tmp_path / "a.ckpt")
    group = resumed.optimizers[0].param_groups[0]
    assert group["initial_lr"] == 5e-4
    assert group["lr"] == pytest.approx(5e-4 * ld.WarmupLinear(2)(10, 10, 1))
    assert group["fused"]
    assert resumed.optimizers[0].state_dict()["state"][0]["step"] == 10


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"deviation 0.5, but the objective assumes 1.0.*sigma_data: 1.0"):
        module(objective=ld.EDM(sigma_data=1.0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        module(label_dropout=1.5)


def test_checkpoint_of_another_format_is_refused(tmp_path):
    fit(module()).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt")
    checkpoint["lightning_diffusion"]["format"] = 99
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"format 99.*reads 1"):
        ld.DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")


def test_defaults_are_not_shared_between_modules():
    first, second = ld.DiffusionModule(network()), ld.DiffusionModule(network())
    assert first.objective is not second.objective
    assert first.representation is not second.representation


def test_training_lowers_the_loss():
    values = []

    class Collect(Callback):
        def on_validation_end(self, trainer, pl_module):
            values.append(trainer.callback_metrics["val/loss"].item())

    fit(module(), steps=-1, max_epochs=4, callbacks=[Collect()])
    assert values[-1] < 0.9 * values[0]
