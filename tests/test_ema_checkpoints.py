"""Every kind of checkpoint holds the online weights, and the averages apart; resuming changes nothing."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from foreign import QUIET, Classifier, averages, checkpointing, fit, online, points, same
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.testing import assert_close

from lightning_diffusion.averaging import averages_in, load_averaged
from lightning_diffusion.callbacks import EMA, PowerFunctionEMA
from lightning_diffusion.profiles import FixedDecay, PowerFunction

NAMES = [
    "body.0.weight",
    "body.0.bias",
    "body.1.weight",
    "body.1.bias",
    "body.3.bias",
    "head.weight",
    "head.bias",
]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def test_situation_saved_after_fit(tmp_path):
    module, ema = Classifier(), EMA(0.9)
    trainer = fit(module, ema)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = load(tmp_path / "after.ckpt")
    assert same(saved["state_dict"], module.state_dict())
    assert same(averages_in(saved)["ema"], averages(ema))
    assert not torch.equal(saved["state_dict"]["head.bias"], averages(ema)["head.bias"])


def test_situation_weights_only(tmp_path):
    module, ema = Classifier(), EMA(0.9)
    saving = checkpointing(tmp_path, every_n_train_steps=8, save_weights_only=True)
    with pytest.warns(
        UserWarning, match=r"no averages\. Write save_weights_only=False, or let the module save"
    ):
        fit(module, ema, saving, enable_checkpointing=True)
    saved = load(tmp_path / "step=8.ckpt")
    assert same(saved["state_dict"], module.state_dict())
    with pytest.raises(ValueError, match="without the EMA callback, or the file left them out"):
        load_averaged(tmp_path / "step=8.ckpt")


def test_situation_weights_only_as_the_warning_says(tmp_path):
    class Saving(Classifier):
        def __init__(self):
            super().__init__()
            self.averages = {}

        def on_save_checkpoint(self, checkpoint):
            checkpoint["averages"] = self.averages

    module, ema = Saving(), EMA(0.9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*save_weights_only")
        fit(module, ema, checkpointing(tmp_path, save_weights_only=True), enable_checkpointing=True)
    saved = load(tmp_path / "step=8.ckpt")
    assert same(averages_in(saved)["ema"], averages(ema))
    assert load_averaged(tmp_path / "step=8.ckpt")["head.bias"].equal(averages(ema)["head.bias"])


@pytest.mark.parametrize("ema_last", [False, True])
def test_situation_exception_during_validation(tmp_path, ema_last):
    class Failing(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if len(self.seen) == 2:
                raise RuntimeError("in validation")

    module, ema = Failing(), EMA(0.9)
    saving = checkpointing(tmp_path, save_on_exception=True)
    callbacks = [saving, ema] if ema_last else [ema, saving]
    with pytest.raises(RuntimeError, match="in validation"):
        fit(module, *callbacks, enable_checkpointing=True, val_check_interval=3)
    saved = load(sorted(tmp_path.glob("*.ckpt"))[-1])
    plain = Classifier()
    fit(plain, max_steps=6)
    assert same(saved["state_dict"], plain.state_dict())
    assert same(online(module), online(plain))
    assert torch.equal(averages_in(saved)["ema"]["head.weight"], module.seen[-1])


def test_situation_saved_while_swapped_in(tmp_path):
    class SavingInside(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    module, ema = Classifier(), EMA(0.9)
    fit(module, ema, SavingInside(), max_epochs=1, max_steps=-1)
    saved = load(tmp_path / "inside.ckpt")
    assert same(saved["state_dict"], module.state_dict())
    assert same(averages_in(saved)["ema"], averages(ema))


def test_situation_resumed_without_the_callback(tmp_path):
    straight = Classifier()
    fit(straight, max_steps=12)
    fit(Classifier(), EMA(0.9), checkpointing(tmp_path, every_n_train_steps=6), enable_checkpointing=True)
    resumed = Classifier()
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: .*EMA"):
        fit(resumed, max_steps=12, ckpt_path=tmp_path / "step=6.ckpt")
    assert same(resumed.state_dict(), straight.state_dict())


@pytest.mark.parametrize("every", [1, 4])
def test_resuming_changes_nothing(tmp_path, every):
    def new():
        return PowerFunctionEMA(0.2, every_n_steps=every)

    straight, ema = Classifier(), new()
    fit(straight, ema, max_steps=18)
    fit(
        Classifier(),
        new(),
        checkpointing(tmp_path, every_n_train_steps=6),
        enable_checkpointing=True,
        max_steps=6,
    )
    resumed, again = Classifier(), new()
    fit(resumed, again, max_steps=18, ckpt_path=tmp_path / "step=6.ckpt")
    assert same(resumed.state_dict(), straight.state_dict())
    assert same(averages(again), averages(ema))
    assert again.state_dict()["clocks"] == ema.state_dict()["clocks"]


def test_a_file_means_the_same_to_the_same_and_to_a_fresh_trainer(tmp_path):
    module, ema = Classifier(), EMA(0.9)
    trainer = fit(module, ema, checkpointing(tmp_path, every_n_train_steps=6), enable_checkpointing=True)
    path = tmp_path / "step=6.ckpt"
    want = averages_in(load(path))["ema"]["head.weight"]
    trainer.test(module, points(8), ckpt_path=path, verbose=False)
    assert torch.equal(module.seen[-1], want)
    fresh, other = Classifier(), EMA(0.5)
    L.Trainer(callbacks=[other], **QUIET).validate(fresh, points(8), ckpt_path=path, verbose=False)
    assert torch.equal(fresh.seen[-1], want)
    assert torch.equal(fresh.head.weight, load(path)["state_dict"]["head.weight"])


def test_a_second_fit_goes_on_and_another_module_begins_anew():
    module, ema = Classifier(), EMA(0.9)
    fit(module, ema, max_steps=4)
    fit(module, ema, max_steps=4)
    assert ema.state_dict()["clocks"]["ema"][0]["steps"] == 8
    fit(Classifier(), ema, max_steps=4)
    assert ema.state_dict()["clocks"]["ema"][0]["steps"] == 4


def test_a_checkpoint_of_another_network_is_refused_by_name(tmp_path):
    fit(Classifier(), EMA(0.9), checkpointing(tmp_path, every_n_train_steps=6), enable_checkpointing=True)
    narrower = EMA(0.9, only=["head.*"])
    message = r"average 'ema' in the checkpoint does not fit.*also has body\.0\.weight.*and 2 more.*`only`"
    with pytest.raises(ValueError, match=message):
        fit(Classifier(), narrower, ckpt_path=tmp_path / "step=6.ckpt", max_steps=12)


def test_changed_profiles_are_named(tmp_path):
    fit(Classifier(), EMA(0.9), checkpointing(tmp_path, every_n_train_steps=6), enable_checkpointing=True)
    changed = EMA({"ema": PowerFunction(0.1), "new": FixedDecay(0.5)})
    with pytest.warns(UserWarning, match="begins anew") as warned:
        fit(Classifier(), changed, ckpt_path=tmp_path / "step=6.ckpt", max_steps=12)
    said = " ".join(str(w.message) for w in warned)
    assert "was FixedDecay(decay=0.9) and goes on as PowerFunction(sigma_rel=0.1" in said
    assert "no average 'new': it begins anew" in said


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_run_with_lightnings_own_averaging_goes_on_as_if_it_had_been_ours(tmp_path):
    def lightnings():
        return EMAWeightAveraging(decay=0.9, use_buffers=False), checkpointing(
            tmp_path, every_n_train_steps=6
        )

    fit(Classifier(), *lightnings(), enable_checkpointing=True, max_steps=6)
    resumed, ema = Classifier(), EMA(0.9)
    fit(resumed, ema, max_steps=18, ckpt_path=tmp_path / "step=6.ckpt")
    straight, theirs = Classifier(), EMAWeightAveraging(decay=0.9, use_buffers=False)
    fit(straight, theirs, max_steps=18)
    assert_close(
        averages(ema), {name: p.detach() for name, p in straight.named_parameters() if name in NAMES}
    )
    plain = Classifier()
    fit(plain, max_steps=18)
    assert same(resumed.state_dict(), plain.state_dict())
    assert ema.state_dict()["clocks"]["ema"][0]["steps"] == 18


def test_lightnings_own_averaging_before_its_start_brings_no_average(tmp_path):
    delayed = EMAWeightAveraging(decay=0.9, update_starting_at_step=1000)
    saving = checkpointing(tmp_path, every_n_train_steps=6)
    fit(Classifier(), delayed, saving, enable_checkpointing=True, max_steps=6)
    resumed, ema = Classifier(), EMA(0.0)
    fit(resumed, ema, max_steps=7, ckpt_path=tmp_path / "step=6.ckpt")
    assert same(averages(ema), {name: p for name, p in online(resumed).items() if name in NAMES})
