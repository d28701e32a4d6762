"""Overflows under float16 are counted, named, told, and end a run that does not learn any more."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from foreign import Classifier, checkpointing, fit, online, same
from lightning.pytorch.plugins.precision import MixedPrecision
from sync_counter import SyncCounter

from lightning_diffusion.callbacks import GradientClipping, LossScaleMonitor


def float16(initial=2.0**10, growth=3):
    scaler = torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=growth)
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler)


class Overflowing(Classifier):
    """Chosen batches overflow in the head alone."""

    def __init__(self, *batches, fused=False):
        super().__init__()
        self.batches, self.fused, self.taken = batches, fused, 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (self.head.bias.sum() * torch.inf if batch_idx in self.batches else 0)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(
            [p for p in self.parameters() if p.requires_grad], lr=0.1, fused=self.fused
        )
        optimizer.register_step_post_hook(self.count)
        return optimizer

    def count(self, optimizer, *_):
        found = getattr(optimizer, "found_inf", None)
        self.taken += found is None or float(found) == 0


class Watch(L.Callback):
    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({k.removeprefix("train/"): float(v) for k, v in trainer.logged_metrics.items()})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("others", [[], [GradientClipping]], ids=["alone", "before clipping"])
def test_overflows_are_counted_and_named(fused, others):
    module, monitor, watch = Overflowing(1, 4, fused=fused), LossScaleMonitor(), Watch()
    scaled = float16()
    callbacks = [monitor, *(new() for new in others), watch]
    fit(module, *callbacks, plugins=[scaled], max_steps=6, log_every_n_steps=1)
    assert monitor.skipped_steps == 2 == 6 - module.taken
    assert monitor.overflows == {"head.bias": 2}
    scales = [logged["loss_scale"] for logged in watch.logged]
    assert scales == [1024, 1024, 512, 512, 512, 256]
    assert [logged["loss_scale_growth_tracker"] for logged in watch.logged] == [0, 1, 0, 1, 2, 0]
    assert [logged["skipped_steps"] for logged in watch.logged] == [0, 1, 1, 1, 2, 2]
    assert [logged["overflow_rate"] for logged in watch.logged] == [0, 1, 0, 0, 1, 0]


def test_the_rate_is_over_the_steps_since_the_last_logging_step():
    watch = Watch()
    fit(Overflowing(1, 4), LossScaleMonitor(), watch, plugins=[float16()], max_steps=6, log_every_n_steps=3)
    assert [logged.get("overflow_rate") for logged in watch.logged[2:]] == pytest.approx([1 / 3] * 4)


def test_watching_changes_nothing():
    watched, plain = Overflowing(1, 4, fused=True), Overflowing(1, 4, fused=True)
    fit(watched, LossScaleMonitor(), plugins=[float16()])
    fit(plain, plugins=[float16()])
    for name, weight in online(watched).items():
        torch.testing.assert_close(weight, online(plain)[name])


def test_skipped_steps_are_counted_on_after_resuming(tmp_path):
    saving = checkpointing(tmp_path, every_n_train_steps=6)
    fit(
        Overflowing(1),
        LossScaleMonitor(),
        saving,
        plugins=[float16()],
        max_steps=6,
        enable_checkpointing=True,
    )
    monitor = LossScaleMonitor()
    fit(Overflowing(2), monitor, plugins=[float16()], max_steps=12, ckpt_path=tmp_path / "step=6.ckpt")
    assert monitor.skipped_steps == 2
    assert monitor.overflows == {"head.bias": 1}


def test_a_collapsed_scale_is_told_with_what_overflowed():
    with pytest.warns(
        UserWarning, match=r"has sunk to 0.5.*head.bias \(2 times\).*bf16-mixed.*learning rate"
    ):
        fit(Overflowing(0, 1), LossScaleMonitor(), plugins=[float16(1.0)], max_steps=6, log_every_n_steps=2)


def test_a_scale_on_its_floor_ends_the_run():
    module = Overflowing(*range(6))
    monitor = LossScaleMonitor(floor=0.25, patience_steps=5)
    with (
        pytest.warns(UserWarning, match="has sunk to"),
        pytest.raises(
            RuntimeError, match=r"5 steps overflowed there, so nothing is learnt any more.*head.bias"
        ),
    ):
        fit(module, monitor, plugins=[float16(1.0)], max_steps=100, log_every_n_steps=1)
    assert monitor.skipped_steps == 7
    assert same(online(module), online(Overflowing()))


def test_a_scale_that_leaves_its_floor_again_does_not():
    monitor = LossScaleMonitor(floor=1.0, patience_steps=2)
    fit(Overflowing(1, 2), monitor, plugins=[float16(2.0, growth=2)], max_steps=18, log_every_n_steps=1)
    assert monitor.skipped_steps == 6


def test_without_a_scaler_it_says_so_once(caplog):
    watch = Watch()
    with caplog.at_level("INFO"):
        fit(Classifier(), LossScaleMonitor(), watch, log_every_n_steps=1)
    assert caplog.text.count("has nothing to watch: there is no loss scaler") == 1
    assert watch.logged[-1].keys() <= {"val/loss"}


def test_nothing_waits_between_logging_steps():
    class Counting(Overflowing):
        def optimizer_step(self, *args):
            with SyncCounter() as counter:
                super().optimizer_step(*args)
            assert not counter.ours

    fit(Counting(2, fused=True), LossScaleMonitor(), plugins=[float16()], log_every_n_steps=100)


@pytest.mark.parametrize("settings", [{"floor": -1.0}, {"floor": 2.0}, {"patience_steps": 0}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="expected 0 <= floor <= warn_below and at least 1 step"):
        LossScaleMonitor(**settings)
