"""Targets: round trips and the proportionality of errors that carries weights between spaces."""

import pytest
import torch
from cases import TARGETS
from torch.testing import assert_close

from lightning_diffusion import NoiseLevel
from lightning_diffusion.noise_level import per_sample

LEVELS = {
    "vp": NoiseLevel(
        torch.linspace(0.05, 0.999, 20).double(), (1 - torch.linspace(0.05, 0.999, 20).double() ** 2).sqrt()
    ),
    "ve": NoiseLevel(torch.ones(20).double(), torch.logspace(-2.5, 2, 20).double()),
    "flow": NoiseLevel(1 - torch.linspace(0.02, 0.98, 20).double(), torch.linspace(0.02, 0.98, 20).double()),
}


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 20, 3, 4, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("process", LEVELS)
@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_round_trip(target, process, data):
    x0, noise = data
    level = LEVELS[process]
    x_t, y = level.diffuse(x0, noise), target.of(x0, noise, level)
    assert_close(target.to_x0(y, x_t, level), x0, rtol=1e-9, atol=1e-9)
    assert_close(target.to_noise(y, x_t, level), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", LEVELS)
@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_errors_are_proportional_to_the_determinant(target, process, data):
    """|y - y_hat| sigma = |D| |x_0 - x_0_hat| at fixed x_t, the one conversion of weights."""
    x0, guess = data
    level = LEVELS[process]
    x_t = level.diffuse(x0, guess.flip(0))
    noise_of = lambda x: (x_t - per_sample(level.alpha, x) * x) / per_sample(level.sigma, x)  # noqa: E731
    error = target.of(x0, noise_of(x0), level) - target.of(guess, noise_of(guess), level)
    D = per_sample(target.determinant(level).abs(), x0)
    assert_close(error.abs() * per_sample(level.sigma, x0), D * (x0 - guess).abs(), rtol=1e-7, atol=1e-9)


def test_energy_is_shared_on_a_variance_preserving_process(data):
    """|x_t|^2 + |v|^2 = |x_0|^2 + |eps|^2: (x_t, v) is (x_0, eps) rotated."""
    x0, noise = data
    level = LEVELS["vp"]
    v = TARGETS[2].of(x0, noise, level)
    assert_close(level.diffuse(x0, noise) ** 2 + v**2, x0**2 + noise**2)
