"""Averages are in while the module is evaluated; the weights themselves always come back."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from foreign import QUIET, Classifier, NaiveEMA, averages, fit, online, points, same
from torch.testing import assert_close

from lightning_diffusion.callbacks import EMA
from lightning_diffusion.profiles import FixedDecay


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


def test_evaluating_without_any_average_says_so():
    module = Classifier()
    with pytest.warns(UserWarning, match="has no averages of this module.*Pass `ckpt_path`"):
        L.Trainer(callbacks=[EMA()], **QUIET).validate(module, points(8), verbose=False)


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
