"""Gradients are clipped unscaled, once per step of each optimizer, in automatic and manual optimization."""

from __future__ import annotations

import pytest
import torch
from clipped import BOUND, Adam, Watch, float16
from foreign import Classifier, fit, online, same
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.callbacks import GradientClipping


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_under_float16_and_skipped_steps_stay_skipped(fused):
    after, plugin = Watch(), float16()
    module = Adam(fused, overflows=(0, 3))
    fit(module, GradientClipping(ld.GlobalNorm(BOUND)), after, plugins=[plugin], max_steps=6)
    finite = [norm for norm in after.norms if norm == norm]
    assert len(finite) == 4
    assert_close(finite, [BOUND] * 4, rtol=1e-3, atol=0)
    assert plugin.scaler.get_scale() == 2.0**10


def test_a_fused_optimizer_under_float16_ends_where_the_other_one_does():
    fused, plain = Adam(True, (2,)), Adam(False, (2,))
    for module in (fused, plain):
        fit(
            module,
            GradientClipping(ld.GlobalNorm(BOUND)),
            GradientClipping(ld.Value(0.01)),
            plugins=[float16()],
        )
    assert not same(online(plain), online(Classifier()))
    for name, weight in online(fused).items():
        assert_close(weight, online(plain)[name])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_loss_does_not_upset_the_scaler(accumulate):
    class Forgetful(Adam):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 3 else super().training_step(batch, batch_idx)

    fused, plain = Forgetful(fused=True), Forgetful(fused=False)
    for module in (fused, plain):
        options = {"plugins": [float16()], "max_steps": 6, "accumulate_grad_batches": accumulate}
        fit(module, GradientClipping(ld.GlobalNorm(0.5)), **options)
    for name, weight in online(fused).items():
        assert_close(weight, online(plain)[name])


class Two(Adam):
    """Two optimizers, by hand; the second takes two steps in every batch."""

    bare = False

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers() if not self.bare else self.trainer.optimizers:
            for _ in range(2 if optimizer is self.optimizers()[1] else 1):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    def configure_optimizers(self):
        parts = (self.body, self.head)
        return [torch.optim.SGD(part.parameters(), lr=0.5, fused=self.fused) for part in parts]


@pytest.mark.parametrize("plugins", [None, "float16"])
def test_each_of_two_optimizers_by_itself_in_manual_optimization(plugins):
    after = Watch()
    bound, plugins = 0.002, [float16(growth=1000)] if plugins else None
    fit(
        Two(fused=True),
        GradientClipping(ld.GlobalNorm(bound)),
        after,
        plugins=plugins,
        max_steps=9,
        log_every_n_steps=1,
    )
    assert len(after.norms) == 9
    assert_close(after.norms, [bound] * 9, rtol=2e-3, atol=0)
    assert {"train/grad_norm/0", "train/grad_norm/1", "train/clip_rate/1"} <= after.logged[-1].keys()


def test_a_step_that_goes_past_it_is_told():
    class Bare(Two):
        bare = True

    with pytest.warns(UserWarning, match=r"on the bare optimizer.*write `optimizer = self.optimizers\(\)`"):
        fit(Bare(), GradientClipping(), max_epochs=1)


def test_the_closures_of_lbfgs_are_each_clipped():
    class Quasi(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.1, max_iter=3)

    after = Watch()
    fit(Quasi(), GradientClipping(ld.GlobalNorm(BOUND)), after, max_steps=2, log_every_n_steps=1)
    assert len(after.norms) > 4
    assert max(after.norms) <= BOUND * 1.001


def test_the_norm_of_each_closure_is_computed_anew():
    class Quasi(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.1, max_iter=3)

    watch = Watch()
    fit(Quasi(), watch, GradientClipping(exclude=["*"]), max_steps=1, log_every_n_steps=1)
    assert len(set(watch.norms)) > 1
    assert watch.logged[-1]["train/grad_norm"] == pytest.approx(watch.norms[-1])
