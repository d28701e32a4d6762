"""Steps that spike leave no trace; weights that spike are put back; all of it is told, saved and resumed."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from clipped import float16
from guarded import EAGER, Poison, Regression, assert_same, batches, everything, spoilt, train
from safetensors.torch import load_file
from sync_counter import SyncCounter
from torch.utils.data import IterableDataset

from lightning_diffusion.callbacks import EMA, GradientClipping, GradientSanitizer, PostHocEMA, SpikeGuard
from lightning_diffusion.cli import main
from lightning_diffusion.gradients import GlobalNorm
from lightning_diffusion.snapshots import list_snapshots
from lightning_diffusion.spikes import Action, SpikeRule

pytestmark = pytest.mark.filterwarnings("ignore:SpikeGuard. Step")


def without(data, *places):
    return [batch for i, batch in enumerate(data) if i not in places]


@pytest.mark.parametrize("by", [math.nan, math.inf, 1e6], ids=["nan", "inf", "outlier"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_with_a_bad_batch_is_the_run_without_that_batch(by, optimizer, fused):
    guard, data = SpikeGuard(EAGER), batches(30)
    found = train(Regression(fused, optimizer), spoilt(data, 20, by=by), guard, EMA(0.9))
    expected = train(Regression(fused, optimizer), without(data, 20), EMA(0.9))
    assert_same(everything(found), everything(expected))
    assert [event.step for event in guard.events] == [20]
    assert found.global_step == expected.global_step + 1


def test_a_bad_micro_batch_spoils_its_whole_step():
    data = batches(30)
    found = train(Regression(), spoilt(data, 20), SpikeGuard(EAGER), EMA(0.9), accumulate_grad_batches=3)
    expected = train(Regression(), without(data, 18, 19, 20), EMA(0.9), accumulate_grad_batches=3)
    assert_same(everything(found), everything(expected))


def test_averages_that_move_now_and_then_do_not_notice():
    data, guard = batches(41), SpikeGuard(EAGER)
    found = train(Regression(), spoilt(data, 20), guard, EMA(0.9, every_n_steps=4))
    expected = train(Regression(), without(data, 20), EMA(0.9, every_n_steps=4))
    assert_same(everything(found), everything(expected))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clips", [[], [GradientClipping(GlobalNorm(0.5))]], ids=["bare", "clipped"])
def test_a_loss_scaler_goes_on(fused, clips):
    """Its scale is halved by a gradient that is not finite, whoever skips the step."""
    data = batches(30)
    plugin, reference = float16(2.0**10, 10**6), float16(2.0**9, 10**6)
    guard = SpikeGuard(EAGER)
    found = train(
        Regression(fused), spoilt(data, 0, 20, by=math.inf), guard, *clips, EMA(0.9), plugins=[plugin]
    )
    train(Regression(fused), without(data, 0, 20), *clips, EMA(0.9), plugins=[reference])
    assert [event.step for event in guard.events] == [0, 20]
    assert plugin.scaler.get_scale() == 2.0**8
    assert all(v.isfinite().all() for v in found.lightning_module.state_dict().values())
    assert found.lr_scheduler_configs[0].scheduler.last_epoch == 28


def test_overflows_are_left_to_the_scaler():
    guard, plugin = SpikeGuard(EAGER), float16(2.0**30, 10**6)
    train(Regression(), batches(30), guard, plugins=[plugin])
    assert plugin.scaler.get_scale() < 2.0**30
    assert guard.events == []


def test_a_rolled_back_run_is_one_that_was_stopped_and_resumed_with_the_next_batches(tmp_path):
    data, guard = batches(60), SpikeGuard(EAGER, snapshot_every_n_steps=10)
    found = train(Regression(), data, guard, EMA(0.9, every_n_steps=3), Poison(34))
    assert [(e.step, e.action, e.to_step) for e in guard.events] == [
        (34, Action.SKIP, None),
        (35, Action.SKIP, None),
        (36, Action.ROLL_BACK, 20),
    ]
    stopped = train(Regression(), data[:20], EMA(0.9, every_n_steps=3))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = train(
        Regression(),
        data[37:],
        EMA(0.9, every_n_steps=3),
        max_epochs=2,
        ckpt_path=tmp_path / "stopped.ckpt",
    )
    assert resumed.global_step == 20 + 23
    assert_same(everything(found), everything(resumed))


@pytest.mark.parametrize("guard_first", [False, True])
@pytest.mark.parametrize("to_step", [20, 23])
def test_snapshots_of_steps_that_were_taken_back_are_written_anew(tmp_path, guard_first, to_step):
    """Every eighth average: 24 and 32 are of weights that have been put back."""

    def ema(name):
        return PostHocEMA(every_n_steps=8, directory=tmp_path / name)

    data, guard = batches(60), SpikeGuard(EAGER, snapshot_every_n_steps=to_step)
    callbacks = [guard, ema("rolled back")] if guard_first else [ema("rolled back"), guard]
    train(Regression(), data, *callbacks, Poison(37))
    train(Regression(), data[:to_step] + data[40:], ema("expected"))
    assert guard.events[-1].to_step == to_step
    found, expected = (list_snapshots(tmp_path / name) for name in ("rolled back", "expected"))
    assert [s.step for s in found] == [s.step for s in expected]
    for a, b in zip(found, expected, strict=True):
        assert_same(load_file(a.path), load_file(b.path))


def test_the_scale_of_losses_is_put_back_too():
    plugin = float16(2.0**4, 10)
    guard = SpikeGuard(EAGER, snapshot_every_n_steps=10)
    scales = []

    class Scales(L.Callback):
        def on_train_batch_end(self, *_):
            scales.append(plugin.scaler.get_scale())

    train(Regression(), batches(40), guard, Scales(), Poison(34), plugins=[plugin])
    assert guard.rollbacks == 1
    assert scales[33] == 2.0**7
    assert plugin.scaler.get_scale() == scales[19] == 2.0**6


BITING = SpikeRule(window=8, history=4, threshold=0.5, ratio=1.05, rollback_after=2, give_up_after=1000)


class Stream(IterableDataset):
    """Batches without an end that the Trainer would know."""

    def __init__(self, data) -> None:
        self.data = data

    def __iter__(self):
        return iter(self.data)


@pytest.mark.parametrize("saved_at", [16, 17, 18, 19, 20, 21, 22])
def test_resuming_changes_nothing(tmp_path, saved_at):
    """At every place of a row of spikes; with a rule that skips and puts back often."""
    data, path = batches(40), tmp_path / "saved.ckpt"
    guards = [SpikeGuard(BITING, None, 5) for _ in range(3)]
    stop = {"max_steps": 40, "max_epochs": 2}
    straight = train(Regression(), Stream(data), guards[0], EMA(0.9), Saving(path, saved_at), **stop)
    train(Regression(), Stream(data), guards[1], EMA(0.9), Saving(path, saved_at), max_steps=saved_at)
    resumed = train(Regression(), Stream(data[saved_at:]), guards[2], EMA(0.9), ckpt_path=path, **stop)
    assert guards[0].rollbacks > 1
    assert guards[0].events == guards[2].events
    assert_same(everything(resumed), everything(straight))


class Saving(L.Callback):
    """Saves at one step, after the guard has done its work."""

    def __init__(self, path, step) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_it_gives_up():
    rule = SpikeRule(history=8, rollback_after=2, give_up_after=5)
    guard, data = SpikeGuard(rule), batches(40)
    with pytest.raises(
        RuntimeError,
        match=r"gives up: 5 steps were not taken.*\(2 times\).*Step 14 given up: gradient norm nan.*usually",
    ):
        train(Regression(), spoilt(data, *range(10, 40)), guard)


def test_events_are_told_counted_and_numbered():
    guard, data = SpikeGuard(EAGER), batches(30)
    with pytest.warns(UserWarning, match=r"Step 20 skipped: gradient norm nan .*loss nan.*samples 320, 321"):
        trainer = train(Regression(), spoilt(data, 20, 25), guard)
    assert guard.events[0].indices == tuple(range(320, 336))
    assert {spike.series for spike in guard.events[1].spikes} == {"gradient norm", "loss"}
    assert float(trainer.logged_metrics["train/spikes"]) == guard.spikes == 2
    assert float(trainer.logged_metrics["train/rollbacks"]) == guard.rollbacks == 0


@pytest.mark.parametrize("plugins", [None, "float16"])
def test_a_step_waits_once(plugins):
    class Counting(Regression):
        waits = ()

        def optimizer_step(self, *args):
            with SyncCounter() as counter:
                super().optimizer_step(*args)
            self.waits = [*self.waits, len(counter.ours)]

    module = Counting()
    train(module, batches(45), SpikeGuard(), plugins=[float16()] if plugins else None, log_every_n_steps=100)
    assert module.waits == [1] * 45


def test_two_optimizers_by_hand_are_judged_by_themselves():
    class Two(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                if batch_idx == 20 and optimizer is self.optimizers()[1]:
                    self.body[3].weight.grad.mul_(1e6)
                optimizer.step()

        def configure_optimizers(self):
            parts = (self.body[:3], self.body[3])
            return [torch.optim.SGD(part.parameters(), lr=0.01, momentum=0.9) for part in parts]

    module, guard, moved = Two(), SpikeGuard(EAGER), []

    class Watch(L.Callback):
        def on_train_batch_start(self, *_):
            self.before = [p.detach().clone() for p in module.parameters()]

        def on_train_batch_end(self, *_):
            pairs = zip(self.before, module.parameters(), strict=True)
            moved.append([not torch.equal(a, b) for a, b in pairs])

    train(module, batches(25), guard, Watch())
    assert moved[19] == [True, False, True, True, True, True]  # a bias before batch norm has no gradient
    assert moved[20] == [True, False, True, True, False, False]
    assert [spike.series for spike in guard.events[0].spikes] == ["gradient norm"]


def test_it_comes_before_what_changes_gradients():
    with pytest.warns(UserWarning, match=r"after GradientSanitizer, GradientClipping in .*: put it before"):
        train(Regression(), batches(2), GradientSanitizer(), GradientClipping(), SpikeGuard())


def test_lbfgs_is_refused():
    class Quasi(Regression):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match=r"cannot skip steps of LBFGS.*AdamW"):
        train(Quasi(), batches(2), SpikeGuard())


@pytest.mark.parametrize("options", [{"band_edges": [1.0, 0.0]}, {"snapshot_every_n_steps": 0}])
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match=r"expected increasing log-SNR.*at least 1 step"):
        SpikeGuard(**options)


YAML = "trainer:\n  callbacks:\n  - {class_path: SpikeGuard, init_args: {rule: {ratio: 5.0}}}\n"


def test_it_is_configured_in_yaml(folder):
    (folder / "guard.yaml").write_text(YAML)
    assert main(["fit", "--config", "tiny.yaml", "--config", "guard.yaml"]) == 0
    (metrics,) = (folder / "runs").glob("*/metrics.csv")
    assert {"train/spikes", "train/rollbacks"} <= set(metrics.read_text().splitlines()[0].split(","))
