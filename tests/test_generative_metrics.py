"""GenerativeMetrics measures what the weights draw, when it should, and leaves training as it is."""

import csv
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from measured import PIXELS, compared, digits
from small_module import fit, module
from test_features import no_network
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception

import lightning_diffusion as ld
from lightning_diffusion.callbacks import EMA, GenerativeMetrics, PowerFunctionEMA
from lightning_diffusion.generative import FIGURES, Draws, drawn_features, figures

NUMBER = 70


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DIFFUSION_CACHE", str(tmp_path / "cache"))


def small(**options):
    return module(sampler=ld.Euler(2), **options)


def metrics(**options):
    return GenerativeMetrics(**{"extractor": PIXELS, "num_samples": NUMBER, **options})


def measured(trainer, name="frechet"):
    """Step and value of every row of metrics.csv with this figure."""
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get(f"metrics/{name}_pixels_{NUMBER}")]
    return [(int(row["step"]), float(row[f"metrics/{name}_pixels_{NUMBER}"])) for row in rows]


def expected(model, weights):
    """All figures, by another way."""
    ready, real = compared()
    labels = digits().content.labels
    return figures(real, drawn_features(model, Draws(NUMBER, weights), ready, labels))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Measured every second step of five."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_DIFFUSION_CACHE", str(folder / "cache"))
        model = small()
        trainer = fit(
            model, None, 5, callbacks=[metrics(every_n_steps=2)], logger=CSVLogger(folder), limit_val_batches=1,
        )  # fmt: skip
    return model, trainer


def test_it_measures_every_n_steps_and_once_at_the_end(run):
    assert [step for step, _ in measured(run[1])] == [1, 3, 4], "steps as Lightning logs them, from 0"


def test_all_figures_are_those_of_the_weights(run):
    found = {name: run[1].callback_metrics[f"metrics/{name}_pixels_{NUMBER}"].item() for name in FIGURES}
    assert found == pytest.approx(expected(run[0], "online"), rel=1e-6)


def test_nothing_of_the_extractor_is_in_the_model_or_the_checkpoint(run, tmp_path):
    run[1].save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == small().state_dict().keys()
    assert not any(isinstance(part, nn.Flatten) for part in run[0].modules())
    assert "GenerativeMetrics" not in str(saved.get("callbacks", {}))


def test_training_is_the_same_without_it_and_the_same_seed_gives_the_same_figure(run, tmp_path):
    plain = small()
    fit(plain, None, 5, limit_val_batches=1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), run[0].parameters(), strict=True))
    again = fit(
        small(),
        None,
        5,
        callbacks=[metrics(every_n_steps=2)],
        logger=CSVLogger(tmp_path),
        limit_val_batches=1,
    )
    assert measured(again) == measured(run[1])


def test_after_validation_both_weights_are_the_right_ones_and_checkpoints_can_watch(tmp_path):
    """While averages are swapped into the module for validation; measured in the last one and not again at the end."""
    model, name = small(), f"metrics/frechet_pixels_{NUMBER}_ema"
    best = ModelCheckpoint(tmp_path, monitor=name)
    callbacks = [EMA(0.5), metrics(weights=["online", "ema"]), best]
    options = {
        "enable_checkpointing": True,
        "val_check_interval": 2,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 1,
    }
    trainer = fit(model, None, 4, callbacks=callbacks, **options)
    for weights in ("online", "ema"):
        found = {
            n: trainer.callback_metrics[f"metrics/{n}_pixels_{NUMBER}_{weights}"].item() for n in FIGURES
        }
        assert found == pytest.approx(expected(model, weights), rel=1e-6)
    assert trainer.callback_metrics[name] != trainer.callback_metrics[name.replace("ema", "online")]
    assert best.best_model_score == min(trainer.callback_metrics[name], best.best_model_score)


def test_averages_that_would_be_mistaken_for_the_weights_are_refused():
    with pytest.raises(ValueError, match=r"EMA is listed after GenerativeMetrics.*list it before"):
        fit(small(), callbacks=[metrics(weights="online"), EMA(0.5)])


class Breaking(L.Callback):
    """A weight becomes NaN at the second step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            with torch.no_grad():
                next(pl_module.network.parameters()).fill_(math.nan)


def test_a_diverged_model_is_warned_of_logged_as_nan_and_trained_on(tmp_path):
    callbacks = [Breaking(), metrics(every_n_steps=1)]
    said = f"at step 2: {NUMBER} of {NUMBER} samples hold NaN.*Training goes on"
    with pytest.warns(UserWarning, match=said):
        trainer = fit(
            small(), None, 3, callbacks=callbacks, logger=CSVLogger(tmp_path), limit_val_batches=0,
        )  # fmt: skip
    assert trainer.global_step == 3
    values = dict(measured(trainer))
    assert math.isfinite(values[0])
    assert math.isnan(values[2])


def test_no_network_ends_the_fit_before_its_first_step(monkeypatch):
    monkeypatch.setattr(inception, "load_state_dict_from_url", no_network)
    trainer = L.Trainer(
        max_steps=3, callbacks=[metrics(extractor=ld.InceptionFeatures())], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(OSError, match=r"Inception weights cannot be had.*ClassifierFeatures.*weights_path"):
        trainer.fit(small(), datamodule=ld.datamodules.DigitsDataModule(16))
    assert trainer.global_step == 0


def test_fewer_samples_than_features_are_warned_of():
    with pytest.warns(UserWarning, match="GenerativeMetrics found 20 samples for 64 features"):
        fit(small(), None, 1, callbacks=[metrics(num_samples=20)], limit_val_batches=0)


def test_fast_dev_run_draws_few_and_guidance_is_in_the_name():
    callback = metrics(guidance=ld.ClassifierFree(1.5))
    trainer = fit(small(), callbacks=[PowerFunctionEMA(), callback], fast_dev_run=True)
    assert "metrics/frechet_pixels_16_guidance1.5" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 5}, "num_samples is 5, expected 10 or more"),
        ({"every_n_steps": 0}, "every_n_steps is 0, expected 1 or more"),
        ({"weights": "averaged"}, "'averaged' are not known: write online, ema"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        metrics(**options)


def test_weights_that_are_not_there_end_the_fit_before_its_first_step():
    with pytest.raises(ValueError, match="'ema' were asked for, but there are no averages"):
        fit(small(), callbacks=[metrics(weights="ema")])


def test_a_module_that_cannot_sample_is_refused():
    with pytest.raises(TypeError, match="Plain has no method `sample`"):
        metrics().setup(None, type("Plain", (nn.Module,), {})(), "fit")


def test_a_network_with_context_is_refused_rather_than_drawn_without():
    net = ld.UNet((1, 8, 8), 8, (1,), 1, attention_levels=(0,), context_dim=4)
    with pytest.raises(ValueError, match="GenerativeMetrics draws without context, but UNet attends"):
        fit(module(network=net, label_dropout=1.0), callbacks=[metrics()])
