"""The EMA callback in a foreign project: right after every real step, in every file, whatever happens."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from foreign import QUIET, Classifier, fit, points
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from sync_counter import SyncCounter
from torch import nn
from torch.testing import assert_close

from lightning_diffusion.averaging import averages_in, load_averaged
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


class NaiveEMA(L.Callback):
    """The definition, written as a loop over tensors, after every batch that moved the weights."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay, self.steps = decay, 0

    def on_fit_start(self, trainer, pl_module) -> None:
        self.average = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        self.last = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        now = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        if any(not torch.equal(now[n], self.last[n]) for n in self.average):
            self.steps += 1
            for name, average in self.average.items():
                average.mul_(self.decay).add_(now[name], alpha=1 - self.decay)
        self.last = now


def online(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def averages(ema: EMA, name: str = "ema") -> dict[str, torch.Tensor]:
    return ema.state_dict()["averages"][name]


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


def test_bfloat16_modules_have_float32_averages():
    ema = EMA(0.9)
    module = Classifier()
    fit(module, ema, precision="bf16-true")
    assert {a.dtype for a in averages(ema).values()} == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    before = {k: a.clone() for k, a in averages(ema).items()}
    with ema.average_parameters(module):
        assert_close(module.head.weight, before["head.weight"].bfloat16())
    assert same(averages(ema), before)


def test_evaluation_sees_the_averages_and_training_the_weights():
    class Watching(Classifier):
        def on_validation_epoch_end(self):
            self.seen.append(self.head.weight.detach().clone())

    module, ema, naive = Watching(), EMA(0.9), NaiveEMA()
    trainer = fit(module, ema, naive, val_check_interval=2)
    for seen in module.seen[-2:]:
        assert_close(seen, naive.average["head.weight"])
    trained = online(module)
    trainer.test(module, points(8), verbose=False)
    assert_close(module.seen[-1], naive.average["head.weight"])
    assert_close(trainer.predict(module, points(8))[0], naive.average["head.weight"])
    assert same(online(module), trained)


def test_buffers_stay_with_the_live_module():
    module, ema = Classifier(), EMA(0.9)
    fit(module, ema)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    with ema.average_parameters(module):
        assert same(dict(module.named_buffers()), buffers)


def test_average_parameters_nests_and_survives_exceptions():
    module, ema = Classifier(), EMA({"a": FixedDecay(0.9), "b": FixedDecay(0.5)})
    fit(module, ema)
    trained = online(module)
    with ema.average_parameters(module):
        with ema.average_parameters(module, "b"):
            assert torch.equal(module.head.weight, averages(ema, "b")["head.weight"])
        assert torch.equal(module.head.weight, averages(ema, "a")["head.weight"])
        assert same({k: v for k, v in module.state_dict().items() if k in trained}, trained)
    with pytest.raises(RuntimeError, match="inside"), ema.average_parameters(module):
        raise RuntimeError("inside")
    assert same(online(module), trained)
    with (
        pytest.raises(ValueError, match="no average 'c', only 'a', 'b'"),
        ema.average_parameters(module, "c"),
    ):
        pass


def test_shared_weights_are_saved_online_under_both_names():
    module, ema = Classifier(), EMA(0.9)
    fit(module, ema)
    want = {key: value.clone() for key, value in module.state_dict().items()}
    with ema.average_parameters(module):
        assert same(dict(module.state_dict()), want)
        assert not torch.equal(module.body[3].weight, want["body.3.weight"])


def checkpointing(path, **options) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=path, filename="{step}", save_top_k=-1, **options)


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


@pytest.mark.parametrize("every", [1, 4])
def test_situation_delayed_start(every):
    module, ema = Classifier(), EMA(0.9, every_n_steps=every, start_step=1000)
    trainer = fit(module, ema)
    assert same(averages(ema), {n: p for n, p in online(module).items() if not n.startswith("frozen")})
    trained = online(module)
    trainer.validate(module, points(8), verbose=False)
    assert torch.equal(module.seen[-1], trained["head.weight"])
    assert same(online(module), trained)


def test_before_the_first_rare_update_the_weights_are_evaluated():
    module, ema = Classifier(), EMA(0.9, every_n_steps=100)
    fit(module, ema, val_check_interval=4)
    assert not torch.equal(module.seen[0], Classifier().head.weight)


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


def test_evaluating_without_any_average_says_so():
    module = Classifier()
    with pytest.warns(UserWarning, match="has no averages of this module.*Pass `ckpt_path`"):
        L.Trainer(callbacks=[EMA()], **QUIET).validate(module, points(8), verbose=False)


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


def test_half_lives_count_images():
    ema = EMA(HalfLife(images=40.0, rampup=1e9))
    fit(Classifier(), ema, loader=points(24, batch=8), accumulate_grad_batches=2, max_steps=5)
    clock = ema.state_dict()["clocks"]["ema"][0]
    assert clock["elapsed"] == 16 + 8 + 16 + 8 + 16
    assert clock["steps"] == 5


def test_compiled_networks_see_the_averages_without_recompiling():
    module, ema = Classifier(), EMA(0.9)
    counter = torch._dynamo.testing.CompileCounter()
    module.head.compile(backend=counter)
    fit(module, ema, val_check_interval=2)
    compiled = counter.frame_count
    module.eval()
    x = torch.randn(4, 5)
    with torch.inference_mode(), ema.average_parameters(module):
        module.head(x)
        frames = counter.frame_count
        assert_close(module.head(x), x @ averages(ema)["head.weight"].T + averages(ema)["head.bias"])
    assert counter.frame_count == frames <= compiled + 1


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
