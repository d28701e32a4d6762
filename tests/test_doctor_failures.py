"""The doctor where something fails or is slow: levels whose gradients are NaN, kinds of steps that do not run."""

import pytest
import torch
from small_module import module, network
from torch import nn

import lightning_diffusion as ld
from lightning_diffusion.analysis import level_profile as profiles
from lightning_diffusion.analysis.doctor import examine
from lightning_diffusion.analysis.findings import Severity
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.trainer_settings import TrainerSettings
from lightning_diffusion.datamodules import DigitsDataModule


class Around(nn.Module):
    """A small network inside of something."""

    def __init__(self):
        super().__init__()
        self.inner = network()


def patient(net, data=None, **settings):
    settings = TrainerSettings({"max_steps": 100, **settings})
    return Patient(module(network=net), data or DigitsDataModule(batch_size=64), settings, steps=3)


class NaNInTheMiddle(Around):
    """Of the drawn levels: the median of ln sigma is -1.2, and c_noise a quarter of it."""

    def forward(self, x, c_noise, **condition):
        factor = torch.where((c_noise + 0.3).abs() < 0.01, torch.nan, 1.0)
        return self.inner(x, c_noise, **condition) * factor[:, None, None, None]


def test_one_level_without_a_finite_gradient_is_an_error():
    section = examine(patient(NaNInTheMiddle()), ["conditioning"]).sections[-1]
    (found,) = [f for f in section.findings if f.severity is Severity.ERROR]
    assert (found.check, found.evidence) == ("gradient-levels", "at log-SNR 2.4")


def test_levels_skipped_for_their_time_are_not_shown_as_measured(monkeypatch):
    monkeypatch.setattr(profiles, "_SECONDS", 0.0)
    one = patient(network())
    profile = profiles.level_profile(one.prepared(), one.drawn)
    assert (len(profile.measured), len(profile.gradients), len(profile.log_snr)) == (1, 1, 15)
    rows = dict(examine(one, ["conditioning"]).sections[-1].tables[0].rows)
    assert "1 of 15 levels" in rows["gradient norm by level"]


class NotInLowPrecision(Around):
    """Has an operator that the low precision lacks."""

    def forward(self, x, c_noise, **condition):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("'some_operator' not implemented for 'BFloat16'")
        return self.inner(x, c_noise, **condition)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_kind_of_steps_that_fails_did_not_run_and_the_others_are_timed(precision):
    report = examine(patient(NotInLowPrecision(), precision=precision), ["averages", "time"])
    parts, kinds = report.sections[-1].tables
    ran = {name.removesuffix(" (as configured)"): "did not run" not in time for name, time in kinds.rows}
    assert ran == {"fp32": True, "bf16": False, "fp32, channels-last": True, "bf16, channels-last": False}
    assert "network, forward and backward" in dict(row[:2] for row in parts.rows)
    assert report.sections[0].findings


class NotAlone(Around):
    """Runs within the objective's loss only, so that its steps are timed."""

    within = False

    def forward(self, x, c_noise, **condition):
        if not self.within:
            raise NotImplementedError("no kernel")
        return self.inner(x, c_noise, **condition)


def test_without_the_network_alone_there_is_no_share_of_it(monkeypatch):
    def loss(objective, net, *arguments):
        net.within = True
        try:
            return whole(objective, net, *arguments)
        finally:
            net.within = False

    whole = ld.DiffusionObjective.loss
    monkeypatch.setattr(ld.DiffusionObjective, "loss", loss)
    section = examine(patient(NotAlone()), ["time"]).sections[-1]
    assert [row[0] for row in section.tables[0].rows] == ["loading", "network, loss, optimizer", "together"]
    assert "outside" not in [found.check for found in section.findings]


@pytest.mark.parametrize(
    ("shape", "number"),
    [((64, 1, 8, 8), 32), ((16, 1, 1024, 1024), 8), ((3, 1, 4096, 4096), 2), ((4, 3, 4096, 4096), 1)],
)
def test_samples_of_one_pass_fit_in_memory(shape, number):
    batch = torch.zeros(1).expand(shape)  # takes no memory
    one = Patient(module(), [batch] * 100, TrainerSettings({"max_steps": 9}), steps=50)
    assert len(one.one_pass) == number
