"""float16 with a loss scaler, on the CPU: skipped steps move nothing, and the run learns as in float32."""

from __future__ import annotations

from itertools import pairwise

import lightning as L
import pytest
import torch
from foreign import QUIET, Classifier, online, same
from foreign import fit as fit_foreign
from lightning.pytorch.plugins.precision import MixedPrecision
from small_module import fit
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.callbacks import EMA, LossScaleMonitor
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.loss_scaling import LossScaler
from lightning_diffusion.networks.embeddings import NoiseEmbedding


class Perceptron(nn.Module):
    image_shape = (1, 8, 8)

    def __init__(self, width=96):
        super().__init__()
        self.noise, self.embedding = NoiseEmbedding(32), nn.Linear(32, width)
        self.stem, self.hidden, self.norm = nn.Linear(64, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 64)

    def forward(self, x, c_noise):
        h = self.stem(x.flatten(1)) + self.embedding(self.noise(c_noise))
        h = h + silu(self.hidden(self.norm(silu(h))))
        return self.head(h).view_as(x)


class Attention(nn.Module):
    """One block of attention over 16 patches."""

    image_shape = (1, 8, 8)

    def __init__(self, width=32):
        super().__init__()
        self.noise, self.embedding = NoiseEmbedding(32), nn.Linear(32, width)
        self.stem, self.place = nn.Linear(4, width), nn.Parameter(0.1 * torch.randn(16, width))
        self.norm1, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 64), nn.Linear(64, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x, c_noise):
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        h = self.stem(patches) + self.place + self.embedding(self.noise(c_noise))[:, None]
        q, k, v = self.qkv(self.norm1(h)).view(-1, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        h = h + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = h + self.down(silu(self.up(self.norm2(h))))
        return self.head(h).view(-1, 4, 4, 2, 2).transpose(2, 3).reshape(x.shape)


def diffusion(network=Perceptron, lr=1e-3, fused=True, kind=ld.DiffusionModule):
    torch.manual_seed(0)
    return kind(
        network=network(),
        representation=ld.Standardize(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr, fused=fused),
        learning_rate=ld.WarmupCosine(warmup_steps=5),
        label_dropout=1.0,
    )


class Overflowing(ld.DiffusionModule):
    """The third batch overflows float16, but not float32."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1e12 if batch_idx == 2 else 1)


class Diary(L.Callback):
    """What every batch leaves behind."""

    def __init__(self, ema):
        self.ema, self.weights, self.averages, self.rates, self.scales = ema, [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(online(pl_module.network))
        self.averages.append({k: a.clone() for k, a in self.ema.state_dict()["averages"]["ema"].items()})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


def lightnings_own():
    return MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


def ours():
    return ld.DiffusionPrecision("16-mixed", loss_scaling=ld.LossScaling(start=1024.0))


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("plugin", [ours, lightnings_own])
def test_an_overflow_halves_the_scale_skips_one_step_and_moves_nothing(plugin, fused):
    model, ema = diffusion(fused=fused, kind=Overflowing), EMA(0.9)
    diary = Diary(ema)
    trainer = fit(model, DigitsDataModule(16), steps=5, plugins=[plugin()], callbacks=[ema, diary])
    assert diary.scales == [1024, 1024, 512, 512, 512]
    assert [same(a, b) for a, b in pairwise(diary.weights)] == [False, True, False, False]
    moved = [not same(a, b) for a, b in pairwise(diary.averages)]
    assert moved == [True, False, True, True]
    expected = [1e-3 * model.learning_rate(step, 5, 16) for step in (1, 2, 2, 3, 4)]
    assert diary.rates == pytest.approx(expected, rel=1e-12)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4


class Clipped(Classifier):
    def __init__(self, fused):
        super().__init__()
        self.fused, self.norms = fused, []

    def on_before_optimizer_step(self, optimizer):
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        self.norms.append(float(nn.utils.get_total_norm(gradients)))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, fused=self.fused)


def test_hooks_and_clipping_see_true_gradients_of_fused_optimizers_too():
    single, fused, plain = Clipped(True), Clipped(True), Clipped(False)
    fit_foreign(single, gradient_clip_val=0.05)
    for model in (fused, plain):
        fit_foreign(model, gradient_clip_val=0.05, plugins=[ours()])
    assert fused.norms == pytest.approx(plain.norms)
    assert fused.norms == pytest.approx(single.norms, rel=0.02)
    assert min(single.norms) > 0.05
    for name, weight in online(fused).items():
        assert_close(weight, online(plain)[name])


def updated(scaler, overflows):
    """Scales after steps of which some overflow."""
    p = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for overflow in overflows:
        optimizer.zero_grad()
        scaler.scale(p.sum() * (torch.inf if overflow else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        yield scaler.get_scale()


def test_between_floor_and_ceiling_it_is_torchs_scaler():
    pattern = [0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    scaling = ld.LossScaling(64.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=2)
    theirs = torch.amp.GradScaler("cpu", 64.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=2)
    assert list(updated(LossScaler("cpu", scaling), pattern)) == list(updated(theirs, pattern))


def test_the_scale_stays_between_floor_and_ceiling():
    scaler = LossScaler("cpu", ld.LossScaling(4.0, growth_interval=1, floor=1.0, ceiling=8.0))
    assert list(updated(scaler, [0, 0, 0, 1, 1, 1, 1, 1, 0])) == [8, 8, 8, 4, 2, 1, 1, 1, 2]


def test_a_resumed_scale_goes_on_under_the_settings_of_this_run():
    scaler = LossScaler("cpu", ld.LossScaling(2.0**30, ceiling=2.0**30))
    list(updated(scaler, [0, 0]))
    resumed = LossScaler("cpu", ld.LossScaling(8.0, growth_interval=3, ceiling=1024.0))
    resumed.load_state_dict(scaler.state_dict())
    assert list(updated(resumed, [1, 0])) == [512, 512]
    again = LossScaler("cpu", ld.LossScaling(8.0, growth_interval=3))
    again.load_state_dict({**again.state_dict(), "_growth_tracker": 2})
    assert list(updated(again, [0])) == [16]


def test_the_monitor_ends_a_run_on_the_scalers_floor():
    class Lost(ld.DiffusionModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.inf

    plugin = ld.DiffusionPrecision("16-mixed", loss_scaling=ld.LossScaling(4.0, floor=1.0))
    monitor = LossScaleMonitor(patience_steps=3)
    with pytest.raises(RuntimeError, match="has sunk to 1 and 3 steps overflowed there"):
        fit(diffusion(kind=Lost), steps=50, plugins=[plugin], callbacks=[monitor], log_every_n_steps=1)


@pytest.mark.parametrize("wrong", [{"floor": 0.0}, {"ceiling": 2.0**10}, {"start": float("nan")}])
def test_scales_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="expected 0 < floor <= start <= ceiling"):
        ld.LossScaling(**wrong)


@pytest.mark.parametrize("wrong", [{"growth_factor": 1.0}, {"backoff_factor": 1.0}, {"growth_interval": 0}])
def test_scaling_that_goes_nowhere_is_refused(wrong):
    with pytest.raises(ValueError, match="expected growth_factor > 1, backoff_factor between 0 and 1"):
        ld.LossScaling(**wrong)


class Scales(L.Callback):
    def __init__(self):
        self.scales = []

    def on_train_batch_end(self, trainer, *_):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


def trained(network, **options):
    """A network after 250 steps, its validation loss in float32, and its Trainer."""
    model, data = diffusion(network, lr=4e-3), DigitsDataModule(64)
    trainer = fit(model, data, 250, limit_val_batches=0, **options)
    (result,) = L.Trainer(**QUIET).validate(model, data, verbose=False)
    return trainer, result["val/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("network", [Perceptron, Attention])
def test_a_run_that_skipped_steps_learns_as_in_float32(network):
    scaling = ld.LossScaling(2.0**15, growth_interval=20, ceiling=2.0**40)
    plugin, monitor, scales = ld.DiffusionPrecision("16-mixed", None, scaling), LossScaleMonitor(), Scales()
    trainer, found = trained(network, plugins=[plugin], callbacks=[monitor, scales])
    _, expected = trained(network)
    assert max(scales.scales) > 2.0**15
    assert 2 <= monitor.skipped_steps == sum(b < a for a, b in pairwise(scales.scales))
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 250 - monitor.skipped_steps
    assert found == pytest.approx(expected, rel=0.02)
