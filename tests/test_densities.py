"""Densities: quantile and log_prob are two routes to one distribution; stratification keeps it and steadies it."""

import math

import pytest
import torch
from cases import DENSITIES, DISCRETE, SCHEDULES
from torch.testing import assert_close

import lightning_diffusion as ld

ONE_OF_EACH_KIND = [ld.EDMSchedule(), ld.LinearSchedule(), ld.FlowSchedule(), ld.ContinuousCosineSchedule()]
CONTINUOUS = [schedule for schedule in SCHEDULES if schedule not in DISCRETE]


@pytest.mark.parametrize(
    "density", [ld.LogNormalSigma(), ld.LogNormalSigma(0.4, 0.7), ld.UniformTime()], ids=repr
)
@pytest.mark.parametrize("schedule", CONTINUOUS, ids=repr)
def test_log_prob_is_the_slope_of_the_quantile(density, schedule):
    """d u / d log_snr = -p(log_snr), by automatic differentiation."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    log_snr = density.quantile(u, schedule)
    if not log_snr.requires_grad:
        pytest.skip("time of a table")
    (slope,) = torch.autograd.grad(log_snr.sum(), u)
    assert_close(density.log_prob(log_snr.detach(), schedule), -(-slope).log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", DENSITIES, ids=repr)
@pytest.mark.parametrize("schedule", ONE_OF_EACH_KIND, ids=repr)
def test_log_prob_integrates_to_one(density, schedule):
    log_snr = torch.linspace(-60, 60, 100_001, dtype=torch.float64)
    mass = torch.trapezoid(density.log_prob(log_snr, schedule).exp(), log_snr)
    assert mass == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize("density", DENSITIES, ids=repr)
@pytest.mark.parametrize("schedule", ONE_OF_EACH_KIND, ids=repr)
def test_noise_rises_with_u(density, schedule):
    u = torch.linspace(1e-12, 1 - 1e-12, 1001, dtype=torch.float64)
    log_snr = density.quantile(u, schedule)
    assert (log_snr[1:] <= log_snr[:-1]).all()
    assert not log_snr.isnan().any()


def test_log_normal_sigma_has_its_moments():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    log_sigma = -ld.LogNormalSigma(-0.8, 1.6).quantile(u, ld.EDMSchedule()) / 2
    assert log_sigma.mean() == pytest.approx(-0.8, abs=1e-9)
    assert log_sigma.std() == pytest.approx(1.6, abs=1e-3)


@pytest.mark.parametrize("schedule", DISCRETE, ids=repr)
def test_uniform_time_takes_every_entry_equally_often(schedule):
    n = 8 * schedule.num_steps
    drawn = ld.UniformTime().quantile((torch.arange(n).double() + 0.5) / n, schedule)
    entries, counts = drawn.unique(return_counts=True)
    assert len(entries) == schedule.num_steps
    assert (counts == 8).all()


def _draws(world_size: int, accumulate: int, batch: int, steps: int, density=ld.LogNormalSigma()):
    return [
        density.draw(
            batch, ld.EDMSchedule(), ld.RandomKey(3, 0, step * accumulate + a, accumulate, rank, world_size)
        )
        for step in range(steps)
        for a in range(accumulate)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(
    ("world_size", "accumulate", "batch"), [(1, 1, 64), (2, 1, 32), (4, 2, 8), (1, 3, 7)]
)
def test_one_draw_falls_into_each_stratum_of_an_optimizer_step(world_size, accumulate, batch):
    log_snr = torch.cat(_draws(world_size, accumulate, batch, 1))
    n = len(log_snr)
    u = torch.special.ndtr((log_snr / -2 + 1.2) / 1.2)
    assert (u * n).floor().sort().values.tolist() == list(range(n))


def test_global_levels_do_not_depend_on_the_number_of_processes():
    """Sample j of rank r is number j * world_size + r of the global batch."""
    alone = _draws(1, 2, 8, 3)
    together = _draws(4, 2, 2, 3)
    for step in range(6):
        assert_close(
            torch.stack(together[4 * step : 4 * step + 4], dim=1).flatten(), alone[step], rtol=0, atol=0
        )


def test_each_place_in_the_batch_is_uniform():
    """Without the shift a place would keep its stratum for ever. Kolmogorov-Smirnov at the 0.1 % level."""
    draws = torch.stack([ld.RandomKey(1, 0, b).stratified_uniform("level", 8) for b in range(2000)])
    for place in range(8):
        u = draws[:, place].sort().values
        distance = (u - torch.arange(2000) / 2000).abs().max()
        assert distance < 1.95 / math.sqrt(2000)


def test_stratified_batch_means_are_steadier():
    """Deviation of the batch mean of sigmoid(log_snr) over 64 samples: about 3e-2 independent, 1e-3 stratified."""
    key = [ld.RandomKey(0, 0, b) for b in range(400)]
    means = {
        draw: torch.stack(
            [
                ld.LogNormalSigma().quantile(getattr(k, draw)("level", 64), ld.EDMSchedule()).sigmoid().mean()
                for k in key
            ]
        ).std()
        for draw in ("uniform", "stratified_uniform")
    }
    assert means["uniform"] > 2e-2
    assert means["stratified_uniform"] < 2e-3


def test_draws_are_a_function_of_place_alone():
    key = ld.RandomKey(seed=5, epoch=2, batch=9)
    assert torch.equal(key.uniform("a", 4), key.uniform("a", 4))
    others = [ld.RandomKey(6, 2, 9), ld.RandomKey(5, 3, 9), ld.RandomKey(5, 2, 8)]
    assert all(not torch.equal(key.uniform("a", 4), other.uniform("a", 4)) for other in others)
    assert not torch.equal(key.uniform("a", 4), key.uniform("b", 4))


def test_ranks_have_noise_of_their_own():
    noises = [
        torch.randn(5, generator=ld.RandomKey(0, 0, 0, 1, rank, 2).local_generator("noise"))
        for rank in range(2)
    ]
    assert not torch.equal(*noises)


@pytest.mark.parametrize("density", DENSITIES, ids=repr)
def test_share_above_is_the_inverse_of_the_quantile(density):
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    schedule = ld.EDMSchedule()
    if isinstance(getattr(density, "schedule", None), ld.DiscreteSchedule):
        u = ((u * 1000).floor() + 1) / 1000  # a table is a staircase: its upper edges
        assert_close(density.share_above(density.quantile(u - 5e-4, schedule) - 1e-9, schedule), u)
    else:
        assert_close(density.share_above(density.quantile(u, schedule), schedule), u)


@pytest.mark.parametrize(
    ("one", "other", "schedules"),
    [
        (ld.LogNormalSigma(-0.4, 0.5), ld.LogitNormalTime(-0.4, 0.5), [ld.FlowSchedule()]),
        (ld.UniformTime(ld.ContinuousCosineSchedule()), ld.CosMapTime(), [ld.FlowSchedule()]),
        (ld.LogUniformSigma(0.01, 50.0), ld.UniformTime(ld.GeometricSchedule()), [ld.EDMSchedule()]),
        (ld.UniformSigma(0.1, 10.0), ld.UniformTime(), [ld.EDMSchedule(0.1, 10.0, rho=1.0)]),
        (ld.ModeTime(scale=0.0), ld.UniformTime(), [ld.FlowSchedule(2.0)]),
    ],
)
def test_densities_that_the_literature_calls_the_same_are(one, other, schedules):
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    for schedule in schedules:
        log_snr = one.quantile(u, schedule)
        assert_close(other.quantile(u, schedule), log_snr)
        assert_close(other.log_prob(log_snr, schedule), one.log_prob(log_snr, schedule))


def test_importance_weights_average_to_one_and_stand_for_the_intended_density():
    drawn, intended = ld.LogNormalSigma(std=1.5), ld.LogNormalSigma()
    density, schedule = ld.Importance(drawn, intended), ld.EDMSchedule()
    log_snr = density.quantile((torch.arange(100_000).double() + 0.5) / 100_000, schedule)
    weight = density.importance(log_snr, schedule)
    direct = intended.quantile((torch.arange(100_000).double() + 0.5) / 100_000, schedule)
    assert weight.mean().item() == pytest.approx(1, abs=1e-3)
    assert (weight * log_snr.sigmoid()).mean().item() == pytest.approx(
        direct.sigmoid().mean().item(), rel=1e-3
    )


def test_truncation_keeps_draws_inside():
    density = ld.Truncated(ld.LogNormalSigma(), -1.0, 2.0)
    log_snr = density.quantile(torch.linspace(0, 1, 101).double().clamp(1e-12, 1 - 1e-12), ld.EDMSchedule())
    assert log_snr.min() >= -1 - 1e-6
    assert log_snr.max() <= 2 + 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ld.LogNormalSigma(std=0.0), "std > 0"),
        (lambda: ld.LogitNormalTime(std=-1.0), "std > 0"),
        (lambda: ld.NormalTime(std=0.0), "std > 0"),
        (lambda: ld.UniformSigma(2.0, 1.0), "sigma_min < sigma_max"),
        (lambda: ld.LogUniformSigma(0.0, 1.0), "0 < sigma_min"),
        (lambda: ld.ModeTime(scale=2.0), "2 / .pi - 2. = 1.7519"),
        (
            lambda: ld.Truncated(ld.LogUniformSigma(0.1, 1.0), 30.0, 40.0).draw(
                4, ld.EDMSchedule(), ld.RandomKey()
            ),
            "no mass between log-SNR 30.0 and 40.0",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
