"""Clipping callbacks in a foreign project: what they clip, leave alone, log and refuse."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from clipped import BOUND, Adam, Watch, float16
from foreign import Classifier, checkpointing, fit, online, points, same
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from sync_counter import SyncCounter
from torch import nn
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion import norms, scaling
from lightning_diffusion.callbacks import (
    AdaptiveGradientClipping,
    GradientClipping,
    GradientSanitizer,
    LossScaleMonitor,
    SpikeGuard,
)
from lightning_diffusion.cli import main
from lightning_diffusion.gradients import Gradients
from lightning_diffusion.norms import tensor_norms, unit_norms


def test_it_equals_the_clipping_of_lightning():
    ours, theirs = Classifier(), Classifier()
    fit(ours, GradientClipping(ld.GlobalNorm(BOUND)))
    fit(theirs, gradient_clip_val=BOUND)
    assert same(online(ours), online(theirs))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_acts_once_per_optimizer_step(accumulate):
    class Counting(ld.GlobalNorm):
        calls = 0

        def clip_(self, gradients):
            Counting.calls += 1
            return super().clip_(gradients)

    before, after = Watch(), Watch()
    trainer = fit(
        Classifier(), before, GradientClipping(Counting(BOUND)), after, accumulate_grad_batches=accumulate
    )
    assert Counting.calls == trainer.global_step == len(after.norms) == 8
    assert min(before.norms) > BOUND
    assert_close(after.norms, [BOUND] * 8, rtol=1e-4, atol=0)


def test_norm_and_rate_are_logged_on_logging_steps():
    before, after = Watch(), Watch()
    rule = ld.GlobalNorm(1.0)
    fit(Classifier(), before, GradientClipping(rule, log_layers=True), after, log_every_n_steps=4)
    assert [bool(logged) for logged in after.logged] == [False] * 3 + [True] * 5
    for step, logged in ((3, after.logged[3]), (7, after.logged[7])):
        assert logged["train/grad_norm"] == pytest.approx(before.norms[step])
        recent = before.norms[step - 3 : step + 1]
        assert logged["train/clip_rate"] == pytest.approx(sum(norm > 1 for norm in recent) / 4)
        layers = [
            logged[f"train/grad_norm_of_layer/{name}"] for name in ("body.0", "body.1", "body.3", "head")
        ]
        assert sum(norm**2 for norm in layers) ** 0.5 == pytest.approx(before.norms[step])
    assert "train/grad_norm_of_layer/frozen" not in after.logged[7]


def test_two_clippers_log_the_first_norm_and_a_rate_each():
    before, last = Watch(), Watch()
    both = [AdaptiveGradientClipping(0.001), GradientClipping(ld.GlobalNorm(BOUND))]
    fit(Classifier(), before, *both, last, log_every_n_steps=1)
    assert max(last.norms) <= BOUND * 1.001
    assert last.logged[-1]["train/grad_norm"] == pytest.approx(before.norms[-1])
    assert {"train/clip_rate_Adaptive", "train/clip_rate_GlobalNorm"} <= last.logged[-1].keys()


@pytest.mark.parametrize("new", [GradientClipping, AdaptiveGradientClipping])
def test_nothing_waits_between_logging_steps(new, monkeypatch):
    class Counting(Classifier):
        def optimizer_step(self, *args):
            with SyncCounter() as counter:
                super().optimizer_step(*args)
            self.waits = [*getattr(self, "waits", []), counter.ours]

    monkeypatch.setattr(scaling, "readable", lambda x: False)
    module = Counting()
    fit(module, new(), log_every_n_steps=100)
    assert module.waits == [[]] * 8


class ZeroStart(Classifier):
    """A residual branch that starts at zero, before the output layer."""

    def __init__(self):
        super().__init__()
        self.body[3] = nn.Linear(5, 5)
        nn.init.zeros_(self.body[3].weight)
        nn.init.constant_(self.body[3].bias, 0.3)


def test_layers_that_start_at_zero_and_the_output_layer_are_left_alone(caplog):
    free, adaptive, module = ZeroStart(), ZeroStart(), AdaptiveGradientClipping(1e-9)
    with caplog.at_level(logging.INFO):
        fit(adaptive, module, max_steps=1)
    fit(free, max_steps=1)
    start, alone = (
        online(ZeroStart()),
        {"body.1.bias", "body.3.weight", "body.3.bias", "head.weight", "head.bias"},
    )
    assert set(module.state_dict()["left_alone"]) == alone
    assert (
        "leaves 5 parameters alone, which start at zero or belong to the output layer: body.1.bias"
        in caplog.text
    )
    for name, weight in online(adaptive).items():
        if name in alone:
            assert weight.equal(online(free)[name])
        else:
            assert_close(weight, start[name], rtol=0, atol=1e-8)


def test_all_are_clipped_on_request_and_fewer_by_pattern():
    everywhere, fewer, start = Classifier(), Classifier(), online(Classifier())
    fit(everywhere, AdaptiveGradientClipping(1e-9, spare=False), max_steps=1)
    assert max(float((w - start[n]).abs().max()) for n, w in online(everywhere).items()) < 1e-8
    fit(fewer, GradientClipping(ld.GlobalNorm(1e-9), exclude=["*.1.*", "head.*"]), max_steps=1)
    moved = {n for n, w in online(fewer).items() if float((w - start[n]).abs().max()) > 1e-8}
    assert moved == {"body.1.weight", "body.1.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    "new", [AdaptiveGradientClipping, lambda: GradientClipping(ld.GlobalNorm(0.1))], ids=["adaptive", "norm"]
)
def test_resuming_changes_nothing(new, tmp_path):
    straight, resumed = ZeroStart(), ZeroStart()
    fit(straight, new(), max_steps=12)
    half = checkpointing(tmp_path, every_n_train_steps=6)
    fit(ZeroStart(), new(), half, max_steps=6, enable_checkpointing=True)
    again = new()
    fit(resumed, again, ckpt_path=tmp_path / "step=6.ckpt", max_steps=12)
    assert same(online(straight), online(resumed))
    assert again.state_dict() == (
        {} if isinstance(again.rule, ld.GlobalNorm) else {"left_alone": again._delicate}
    )


def test_a_second_fit_leaves_the_same_layers_alone():
    callback, module = AdaptiveGradientClipping(), ZeroStart()
    fit(module, callback, max_steps=2)
    first = callback.state_dict()
    fit(module, callback, max_steps=2)
    assert callback.state_dict() == first
    fit(Classifier(), callback, max_steps=1)
    assert callback.state_dict() == {"left_alone": ["body.1.bias", "head.weight", "head.bias"]}


def test_two_clippings_are_refused():
    with pytest.raises(
        ValueError, match=r"gradient_clip_val=0.5\) beside GradientClipping, expected one of them"
    ):
        fit(Classifier(), GradientClipping(), gradient_clip_val=0.5)


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(
        ValueError, match=r"no parameter is called 'haed.\*'; the first of .* Write a pattern"
    ):
        fit(Classifier(), GradientClipping(exclude=["body.*", "haed.*"]))


def test_it_needs_only_gradients():
    class Frozen(Classifier):
        def training_step(self, batch, batch_idx):
            return None

    fit(Frozen(), GradientClipping(), AdaptiveGradientClipping(), max_steps=2)
    assert len(Gradients([Frozen().parameters()])) == 0
    assert len(points()) == 6


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_hide_gradients_are_refused(strategy):
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(ValueError, match=rf"under {strategy.__name__}.*Shard with ModelParallelStrategy"):
        GradientClipping().setup(trainer, Classifier(), "fit")


def test_all_callbacks_share_one_norm(monkeypatch):
    asked = []
    monkeypatch.setattr(norms, "tensor_norms", lambda x: asked.append(len(x)) or tensor_norms(x))
    every = [LossScaleMonitor(), GradientSanitizer(), GradientClipping(log_layers=True)]
    fit(Adam(fused=True), *every, plugins=[float16()], log_every_n_steps=1)
    assert asked == [7] * 8


def test_all_callbacks_read_gradients_once_where_one_of_them_looks_at_units(monkeypatch):
    read = []
    monkeypatch.setattr(norms, "unit_norms", lambda *x: read.extend(map(len, x)) or unit_norms(*x))
    monkeypatch.setattr(norms, "tensor_norms", lambda x: read.append(0) or tensor_norms(x))
    after, loose = Watch(), GradientClipping(ld.GlobalNorm(1e9), log_layers=True)
    adaptive = AdaptiveGradientClipping(1e-3, spare=False)
    fit(Adam(), SpikeGuard(), GradientSanitizer(), adaptive, loose, after, max_steps=3)
    assert read == [7, 7] * 3  # gradients, weights
    assert len(after.norms) == 3


YAML = """\
trainer:
  callbacks:
  - {class_path: GradientClipping, init_args: {rule: {class_path: UnitNorm, init_args: {max_norm: 0.5}}}}
  - {class_path: AdaptiveGradientClipping, init_args: {clip_factor: 0.02, exclude: ["*.bias"]}}
  - LossScaleMonitor
  - GradientSanitizer
"""


def test_they_are_configured_in_yaml(folder):
    (folder / "clipping.yaml").write_text(YAML)
    assert main(["fit", "--config", "tiny.yaml", "--config", "clipping.yaml"]) == 0
    (metrics,) = (folder / "runs").glob("*/metrics.csv")
    logged = {
        "train/grad_norm",
        "train/clip_rate_UnitNorm",
        "train/clip_rate_Adaptive",
        "train/sanitized_elements",
    }
    assert logged <= set(metrics.read_text().splitlines()[0].split(","))
