"""The EMA callback in a foreign project moves after every step that was really taken, and only then."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from foreign import Classifier, NaiveEMA, averages, fit, points, same
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins.precision import MixedPrecision
from sync_counter import SyncCounter
from torch import nn
from torch.testing import assert_close

from lightning_diffusion.callbacks import EMA, PowerFunctionEMA
from lightning_diffusion.profiles import FixedDecay, HalfLife, PowerFunction

NAMES = [
    "body.0.weight",
    "body.0.bias",
    "body.1.weight",
    "body.1.bias",
    "body.3.bias",
    "head.weight",
    "head.bias",
]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_follows_the_definition_under_accumulation(accumulate):
    ema, naive = EMA(decay=0.9), NaiveEMA()
    fit(Classifier(), ema, naive, accumulate_grad_batches=accumulate)
    assert naive.steps == 8
    assert list(averages(ema)) == NAMES
    assert_close(averages(ema), naive.average)


def test_several_averages_at_once():
    both = EMA(decay={"short": FixedDecay(0.5), "long": PowerFunction(0.2)}, every_n_steps=2)
    fit(Classifier(), both)
    for name, alone in [
        ("short", EMA(decay=0.5, every_n_steps=2)),
        ("long", PowerFunctionEMA(0.2, every_n_steps=2)),
    ]:
        fit(Classifier(), alone)
        assert same(averages(both, name), averages(alone))


def test_averaging_changes_nothing_in_training():
    with_ema, without = Classifier(), Classifier()
    fit(with_ema, EMA(0.9), val_check_interval=2)
    fit(without, val_check_interval=2)
    assert same(with_ema.state_dict(), without.state_dict())


def scaled(module: L.LightningModule) -> MixedPrecision:
    return MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))


class Overflowing(Classifier):
    """Every third batch overflows float16, the first one too."""

    fused = False

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1e8 if batch_idx % 3 == 0 else 1)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1, fused=self.fused)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("profile", [FixedDecay(0.9), PowerFunction(0.2), HalfLife(images=20.0)], ids=repr)
def test_steps_that_the_scaler_skipped_do_not_count(fused, profile):
    class Recording(Overflowing):
        pass

    Recording.fused = fused
    module, ema, naive = Recording(), EMA(profile), NaiveEMA()
    fit(module, ema, naive, max_steps=12, plugins=[scaled(module)])
    assert naive.steps == 8
    clock = ema.state_dict()["clocks"]["ema"][0]
    assert clock["elapsed"] - clock["skipped"] == naive.steps * (4 if profile.clock == "images" else 1)
    if isinstance(profile, FixedDecay):
        assert_close(averages(ema), naive.average)


def test_fused_and_unfused_skips_give_the_same_average():
    results = []
    for fused in (False, True):
        module, ema = Overflowing(), EMA(PowerFunction(0.2), every_n_steps=2)
        module.fused = fused
        fit(module, ema, max_steps=12, plugins=[scaled(module)])
        results.append(averages(ema))
    assert_close(results[0], results[1], rtol=0.05, atol=0.02)


class WithoutGradients(Classifier):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*training_step.*returned.*None")
def test_a_step_without_gradients_does_not_count():
    ema = EMA(0.9)
    fit(WithoutGradients(), ema)
    assert ema.state_dict()["clocks"]["ema"][0]["steps"] == 4


class Adversarial(Classifier):
    """Two optimizers by hand; the second steps every third batch, the first twice per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        for optimizer in [body, body, head] if batch_idx % 3 == 0 else [body, body]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]


def test_each_optimizer_advances_the_averages_of_its_own_parameters():
    ema = EMA(0.9)
    fit(Adversarial(), ema, max_steps=14)
    body, head = ema.state_dict()["clocks"]["ema"]
    assert (body["steps"], head["steps"]) == (12, 2)


def test_only_some_parameters_by_name():
    ema = EMA(0.9, only=["head.*"])
    fit(Adversarial(), ema, max_steps=14)
    assert list(averages(ema)) == ["head.weight", "head.bias"]
    with pytest.raises(ValueError, match=r"no parameter is called 'generator\.\*'; the first of 7 are"):
        fit(Classifier(), EMA(0.9, only=["generator.*"]))


def test_the_module_may_say_what_is_averaged():
    class Choosing(Classifier):
        def averaged_parameters(self):
            return {"head.bias": self.head.bias}

    ema = EMA(0.9)
    fit(Choosing(), ema)
    assert list(averages(ema)) == ["head.bias"]


def test_half_lives_count_images():
    ema = EMA(HalfLife(images=40.0, rampup=1e9))
    fit(Classifier(), ema, loader=points(24, batch=8), accumulate_grad_batches=2, max_steps=5)
    clock = ema.state_dict()["clocks"]["ema"][0]
    assert clock["elapsed"] == 16 + 8 + 16 + 8 + 16
    assert clock["steps"] == 5


def test_no_synchronisation_of_ours_while_training():
    class Counting(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            self.counter = SyncCounter()
            self.counter.__enter__()
            self.found = getattr(self, "found", [])

        def on_train_batch_end(self, trainer, *_):
            self.counter.__exit__(None, None, None)
            self.found += self.counter.ours

    counting = Counting()
    ema = EMA({"a": PowerFunction(0.1), "b": HalfLife()}, every_n_steps=2)
    fit(Classifier(), counting, ema, limit_val_batches=0)
    fused = Overflowing()
    fused.fused = True
    fit(fused, counting, EMA(PowerFunction(0.1)), plugins=[scaled(fused)], limit_val_batches=0)
    assert counting.found == []


def test_sparse_parameters_are_refused_by_name():
    class Sparse(Classifier):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.eye(3).to_sparse())

    with pytest.raises(ValueError, match=r"'table' has the layout torch\.sparse_coo; only dense.*only="):
        fit(Sparse(), EMA(0.9))


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"start_step": -1}])
def test_impossible_numbers_of_steps_are_refused(options):
    with pytest.raises(ValueError, match=r"has to be at least 1 and .* at least 0 optimizer steps"):
        EMA(**options)


def test_parameters_that_are_unfrozen_later_are_named():
    class Unfreezing(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.head)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.head, optimizer)

    with pytest.warns(UserWarning, match=r"'head\.weight' and 1 others .* A new call of fit begins"):
        fit(Classifier(), Unfreezing(), EMA(0.9), max_steps=12)
