"""What is attainable is what the best denoisers attain, under every objective."""

from __future__ import annotations

import math

import pytest
import torch
from oracles_of_losses import Playing, losses_at
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.analysis.attainable import exact_attainable, linear_attainable, measured_variances
from lightning_diffusion.noise_level import per_sample

OBJECTIVES = {
    "edm": ld.EDM(sigma_data=0.7),
    "ddpm": ld.DDPM(),
    "v, min-SNR": ld.VPrediction(weighting=ld.MinSNR()),
    "flow": ld.RectifiedFlow(),
    "learned weight": ld.EDM2(),
}
VARIANCES = torch.tensor([4.0, 1.0, 0.25, 0.01])
MIXTURE = ld.GaussianMixture([0.3, 0.7], [[-1.5, 0.0], [0.5, 0.5]], [0.2, 0.4])
LEVELS = [-5.0, -1.0, 0.5, 3.0, 7.0]


def wiener(x_t, level):
    """E[x_0 | x_t] of N(0, diag(VARIANCES))."""
    alpha, sigma = per_sample(level.alpha, x_t), per_sample(level.sigma, x_t)
    return alpha * VARIANCES * x_t / (alpha**2 * VARIANCES + sigma**2)


def normal(n, generator):
    return VARIANCES.sqrt() * torch.randn(n, len(VARIANCES), generator=generator)


def mixed(n, generator):
    return MIXTURE.sample(n, generator).float()


@pytest.mark.parametrize("log_snr", LEVELS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_linear_is_what_the_best_linear_denoiser_attains(objective, log_snr):
    level, losses = losses_at(objective, wiener, normal, log_snr)
    expected = linear_attainable(objective, VARIANCES)(level)[0]
    assert abs(losses.mean() - expected) < 4 * losses.std() / math.sqrt(len(losses))


@pytest.mark.parametrize("log_snr", LEVELS)
@pytest.mark.parametrize("name", ["edm", "flow"])
def test_exact_is_what_the_exact_denoiser_attains(name, log_snr):
    level, losses = losses_at(OBJECTIVES[name], MIXTURE.denoise, mixed, log_snr)
    expected = exact_attainable(OBJECTIVES[name], MIXTURE)(level)[0]
    assert abs(losses.mean() - expected) < 4 * losses.std() / math.sqrt(len(losses)) + 0.005 * expected


def test_no_denoiser_is_better_than_the_exact_one_and_at_both_ends_the_linear_one_is_it():
    objective, log_snr = OBJECTIVES["edm"], torch.linspace(-9, 14, 60)
    level = objective.schedule.at(log_snr)
    x = MIXTURE.sample(200_000, torch.Generator().manual_seed(0))
    linear = linear_attainable(objective, torch.linalg.eigvalsh(x.T.cov()))(level)
    exact = exact_attainable(objective, MIXTURE)(level)
    ratio = exact / linear
    assert ratio.max() < 1.002
    assert ratio.min() < 0.8
    assert_close(ratio[0], torch.tensor(1.0), rtol=3e-3, atol=0)
    assert_close(ratio[-1], torch.tensor(1.0), rtol=1e-2, atol=0)


def test_one_gaussian_is_a_mixture_and_a_linear_problem():
    """Two routes to one curve, also for scaled samples."""
    objective = OBJECTIVES["v, min-SNR"]
    level = objective.schedule.at(torch.linspace(-8, 8, 33))
    one = ld.GaussianMixture([1.0], [[3.0, -1.0]], [0.5])
    exact = exact_attainable(objective, one, scale=1.7)(level)
    assert_close(
        exact, linear_attainable(objective, torch.full((2,), (1.7 * 0.5) ** 2))(level), rtol=1e-5, atol=0
    )


def test_told_the_component_nothing_but_its_own_spread_is_left():
    objective = OBJECTIVES["edm"]
    level = objective.schedule.at(torch.linspace(-6, 8, 15))
    parts = [linear_attainable(objective, torch.full((2,), float(s) ** 2))(level) for s in MIXTURE.stds]
    told = exact_attainable(objective, MIXTURE, labelled=1.0)(level)
    assert_close(told, 0.3 * parts[0] + 0.7 * parts[1], rtol=6e-3, atol=0)
    half = exact_attainable(objective, MIXTURE, labelled=0.5)(level)
    assert_close(half, (told + exact_attainable(objective, MIXTURE)(level)) / 2, rtol=1e-5, atol=0)


def test_pure_noise_and_clean_data_are_finite_and_unit_for_edm():
    """At SNR 0 nothing but the mean is known, so the residual is left whole: its variance is that of the data."""
    objective = ld.RectifiedFlow(weighting=ld.EDMWeighting())
    level = ld.NoiseLevel(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    found = linear_attainable(ld.EDM(), torch.tensor([0.25, 0.25]))(level)
    assert_close(found, torch.ones(2))
    assert linear_attainable(objective, VARIANCES)(level).isfinite().all()


def test_variances_are_those_of_the_principal_components():
    generator = torch.Generator().manual_seed(0)
    turned, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    x = 5.0 + normal(40_000, generator) @ turned
    found = measured_variances(x.split(1000), samples=40_000)
    assert_close(found, VARIANCES.sort().values.double(), rtol=0.03, atol=0)
    assert found.dtype == torch.float64


def test_large_images_are_taken_apart_by_frequency_and_channel():
    """Moving averages of white noise on a torus, and channels that are mixed: both spectra are known."""
    size, generator = 32, torch.Generator().manual_seed(0)
    white = torch.randn(1500, 2, size, size, generator=generator)
    smooth = sum(white.roll(shift, -1) for shift in range(3)) / 3
    x = torch.stack([smooth[:, 0], smooth[:, 0] + 0.5 * smooth[:, 1]], 1) + 2.0
    found = measured_variances(x.split(500)).sort().values
    k = torch.arange(size, dtype=torch.float64)
    gain = ((1 + 2 * (2 * torch.pi * k / size).cos()) / 3).square()
    mixing = torch.tensor([[1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    known = (gain[:, None] * torch.linalg.eigvalsh(mixing @ mixing.T)).repeat(size, 1).flatten().sort().values
    assert_close(found.sum(), known.sum(), rtol=0.01, atol=0)
    assert_close(found[::64], known[::64], rtol=0.2, atol=2e-3)


def test_variances_of_processes_are_averaged_as_moments():
    """A mean over processes is asked for twice: of first and of second moments."""
    asked = []
    measured_variances([torch.randn(50, 3)], mean=lambda x: asked.append(tuple(x.shape)) or x)
    assert asked == [(1, 3), (1, 3, 3)]


def test_no_data_are_refused():
    with pytest.raises(ValueError, match="Found no data; expected at least one batch"):
        measured_variances([])


def test_the_oracle_plays_any_denoiser():
    """What stands in for a network here denoises as it is told."""
    objective, x_t = OBJECTIVES["flow"], torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    level = objective.schedule.at(torch.full((5,), 1.0))
    assert_close(objective.denoise(Playing(wiener, objective, level), x_t, level), wiener(x_t, level))
