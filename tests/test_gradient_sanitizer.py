"""NaN and infinities in gradients are replaced, counted and told, and only where no scaler has to see them."""

from __future__ import annotations

import math
import warnings

import lightning as L
import pytest
import torch
from foreign import Classifier, fit, online, same
from lightning.pytorch.plugins.precision import MixedPrecision
from sync_counter import SyncCounter

import lightning_diffusion as ld
from lightning_diffusion import scaling
from lightning_diffusion.callbacks import GradientClipping, GradientSanitizer


class Breaking(L.Callback):
    """Puts two broken elements into the gradients of some steps."""

    def __init__(self, *steps):
        self.steps, self.after, self.logged = steps, [], []

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            pl_module.head.bias.grad[0] = math.nan
            pl_module.body[0].weight.grad[1, 2] = -math.inf

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append((pl_module.head.bias.grad.tolist(), float(pl_module.body[0].weight.grad[1, 2])))
        self.logged.append(trainer.logged_metrics.get("train/sanitized_elements"))


def test_broken_elements_are_replaced_and_the_others_kept():
    module, breaking = Classifier(), Breaking(2)
    plain, none = Classifier(), Breaking()
    fit(module, breaking, GradientSanitizer(nan=0.0, posinf=3.0, neginf=-4.0), log_every_n_steps=4)
    fit(plain, none)
    assert breaking.after[:2] == none.after[:2]
    (first, second), weight = breaking.after[2]
    assert (first, weight) == (0.0, -4.0)
    assert second == none.after[2][0][1]
    assert all(weight.isfinite().all() for weight in online(module).values())
    assert [None if x is None else float(x) for x in breaking.logged] == [None] * 3 + [2.0] * 4 + [0.0]


def test_without_it_weights_are_lost():
    module = Classifier()
    fit(module, Breaking(2))
    assert not online(module)["head.bias"].isfinite().all()


def test_it_comes_before_clipping():
    module, breaking = Classifier(), Breaking(2)
    fit(module, breaking, GradientSanitizer(), GradientClipping(ld.GlobalNorm(0.1)))
    assert abs(breaking.after[2][1] + 0.1) < 1e-6  # -1e5 is all that is left in a gradient of length 0.1
    assert all(weight.isfinite().all() for weight in online(module).values())


def test_it_changes_nothing_where_all_is_finite():
    guarded, plain = Classifier(), Classifier()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*NaN or infinite.*")
        fit(guarded, GradientSanitizer())
    fit(plain)
    assert same(online(guarded), online(plain))


def test_what_was_replaced_is_told_once():
    with pytest.warns(
        UserWarning, match=r"8 elements of gradients were NaN or infinite since.*look for the cause"
    ):
        fit(Classifier(), Breaking(0, 1, 2, 3, 5), GradientSanitizer(), log_every_n_steps=4)


def test_nothing_waits_between_logging_steps(monkeypatch):
    class Counting(Classifier):
        def optimizer_step(self, *args):
            with SyncCounter() as counter:
                super().optimizer_step(*args)
            assert not counter.ours

    monkeypatch.setattr(scaling, "readable", lambda x: False)
    fit(Counting(), GradientSanitizer(), log_every_n_steps=100)


def test_a_scaler_sees_what_overflowed(caplog):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    with caplog.at_level("INFO"):
        fit(Classifier(), Breaking(2), GradientSanitizer(), plugins=[plugin])
    assert scaler.get_scale() == 2.0**9
    assert "does nothing here: the loss scaler skips steps that overflow" in caplog.text


@pytest.mark.parametrize(
    "limits", [{"posinf": math.inf}, {"neginf": 1.0}, {"nan": math.nan}, {"posinf": -1.0}]
)
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(ValueError, match="expected finite numbers with neginf <= nan <= posinf"):
        GradientSanitizer(**limits)
