"""The doctor where something fails or is slow: levels whose gradients are NaN, kinds of steps that do not run."""

import torch
from small_module import module, network
from torch import nn

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
