"""Properties over levels, shapes and dtypes, and the whole product of schedules, targets and preconditionings."""

import math

import pytest
import torch
from cases import DENSITIES, DISCRETE, PRECONDITIONINGS, PURE_NOISE_AT_THE_END, SCHEDULES, TARGETS, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import lightning_diffusion as ld

settings.register_profile("fixed", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("fixed")

PROCESSES = [ld.EDMSchedule(), ld.ContinuousCosineSchedule(), ld.FlowSchedule()]
CONTINUOUS = [schedule for schedule in SCHEDULES if schedule not in DISCRETE]
FULL = [p for p in PRECONDITIONINGS if isinstance(p, ld.EDMPreconditioning)]
PRODUCT = [(schedule, p) for schedule in SCHEDULES for p in PRECONDITIONINGS]
LEGAL = [pair for pair in PRODUCT if not refused(*pair)]

log_snrs = st.floats(-12, 12)
processes = st.sampled_from(PROCESSES)
targets = st.sampled_from(TARGETS)
shapes = st.lists(st.integers(1, 4), min_size=0, max_size=3)
seeds = st.integers(0, 2**31)


def name(pair):
    return f"{pair[0]}-{type(pair[1]).__name__}-{pair[1].target}-{pair[1].sigma_data}"


def draw(seed, *shape, dtype=torch.float64):
    """x_0 and noise; rounded from the same float64 numbers for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype).unbind()


def ends(schedule):
    """Levels in float64 from the first to the last that can be drawn, and pure noise where the schedule has it."""
    return schedule(torch.tensor([1e-12, 1e-7, 1e-3, 0.3, 0.7, 0.999, 1 - 1e-12, 1], dtype=torch.float64))


@given(processes, targets, st.lists(log_snrs, min_size=1, max_size=5), shapes, seeds)
def test_targets_give_data_and_noise_back(process, target, log_snr, shape, seed):
    """y -> x_0, y -> eps in float64; where D is small, to what its size leaves of 16 digits."""
    level = process.at(torch.tensor(log_snr, dtype=torch.float64))
    x0, noise = draw(seed, len(log_snr), *shape)
    x_t, y = level.diffuse(x0, noise), target.of(x0, noise, level)
    loss = (level.alpha + level.sigma) * (target.row(level)[1].abs() + 1) / target.determinant(level).abs()
    tolerance = 1e-13 * loss.max().item()
    assert_close(target.to_x0(y, x_t, level), x0, rtol=tolerance, atol=tolerance)
    loss = (level.alpha + level.sigma) * (target.row(level)[0].abs() + 1) / target.determinant(level).abs()
    tolerance = 1e-13 * loss.max().item()
    assert_close(target.to_noise(y, x_t, level), noise, rtol=tolerance, atol=tolerance)


@given(processes, targets, targets, log_snrs, seeds)
def test_a_target_turned_into_another_and_back_is_itself(process, one, other, log_snr, seed):
    level = process.at(torch.tensor([log_snr], dtype=torch.float64))
    x_t, y = draw(seed, 1, 6)  # any numbers: no x_0 need have made them
    there = other.of(one.to_x0(y, x_t, level), one.to_noise(y, x_t, level), level)
    back = one.of(other.to_x0(there, x_t, level), other.to_noise(there, x_t, level), level)
    assert_close(back, y, rtol=1e-6, atol=1e-6 * (1 + x_t.abs().max().item() / level.sigma.item() ** 2))


@given(st.floats(0.05, 20), targets, st.lists(log_snrs, min_size=1, max_size=6), seeds)
def test_every_target_means_the_same_denoiser(sigma_data, target, log_snr, seed):
    """One output under full preconditioning, read as y by c_skip and c_out, is one x_0_hat for all."""
    preconditioning = ld.EDMPreconditioning(target, sigma_data)
    level = ld.ContinuousCosineSchedule().at(torch.tensor(log_snr, dtype=torch.float64))
    x_t, output = draw(seed, len(log_snr), 3)
    c = preconditioning(level)
    y = c.c_skip[:, None] * x_t + c.c_out[:, None] * output
    tolerance = 1e-12 * math.exp(max(map(abs, log_snr)))
    assert_close(
        target.to_x0(y, x_t, level), preconditioning.to_x0(output, x_t, level), rtol=1e-6, atol=tolerance
    )


@given(st.floats(0.01, 100), processes, targets, st.lists(st.floats(-60, 60), min_size=1, max_size=8))
def test_second_moments_are_1_and_the_residual_is_news(sigma_data, process, target, log_snr):
    """E[(c_in x_t)^2] = E[R^2] = 1 and E[R x_t] = 0, from R's own coefficients of x_0 and eps."""
    preconditioning = ld.EDMPreconditioning(target, sigma_data)
    level = process.at(torch.tensor(log_snr, dtype=torch.float64))
    check_moments(preconditioning, level)


@pytest.mark.parametrize("preconditioning", FULL, ids=repr)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_second_moments_are_1_at_both_ends_of_every_schedule(schedule, preconditioning):
    check_moments(preconditioning, ends(schedule))


def check_moments(preconditioning, level):
    sd, ones = preconditioning.sigma_data, torch.ones_like(level.alpha)
    of_x0 = preconditioning.residual(ones, torch.zeros_like(ones), level)
    of_noise = preconditioning.residual(torch.zeros_like(ones), ones, level)
    c_in = preconditioning.c_in(level)
    assert_close((c_in * level.alpha * sd) ** 2 + (c_in * level.sigma) ** 2, ones, rtol=1e-12, atol=0)
    assert_close((of_x0 * sd) ** 2 + of_noise**2, ones, rtol=1e-12, atol=0)
    correlation = c_in * (of_x0 * level.alpha * sd**2 + of_noise * level.sigma)
    assert_close(correlation, torch.zeros_like(ones), rtol=0, atol=1e-12)


def fitting(preconditioning):
    """A weight under which the loss exists: |score error|^2 diverges as 1 / sigma^2, |x_0 error|^2 SNR as SNR."""
    if isinstance(preconditioning, ld.EDMPreconditioning):
        return ld.EDMWeighting()
    return ld.SNRPower() if preconditioning.target == ld.Score() else ld.Constant()


class Layer(nn.Module):
    """One that autocast runs in low precision, with small outputs, as networks start."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)
        nn.init.normal_(self.linear.weight, std=1e-3)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, c_noise):
        return self.linear(x)


@pytest.mark.parametrize("pair", LEGAL, ids=name)
def test_loss_and_gradient_are_finite_at_both_ends_in_every_precision(pair):
    """Levels in float32, as in training, the network under autocast."""
    schedule, preconditioning = pair
    objective = ld.DiffusionObjective(schedule, ld.UniformTime(), preconditioning, fitting(preconditioning))
    x0, noise = draw(1, 8, 3, dtype=torch.float32)
    level, network = ends(schedule).to(x0), Layer()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        network.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            report = objective.loss_at(network, x0, noise, level)
        report.loss.backward()
        assert report.per_sample.isfinite().all()
        assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("pair", [pair for pair in PRODUCT if refused(*pair)], ids=name)
def test_the_rest_of_the_product_is_refused(pair):
    assert pair[0] in PURE_NOISE_AT_THE_END
    with pytest.raises(ValueError, match="Use the target V, Flow or X0"):
        ld.DiffusionObjective(pair[0], ld.UniformTime(), pair[1], ld.EDMWeighting())


@given(
    st.sampled_from(LEGAL),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 5),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seeds,
)
def test_reports_have_the_batch_s_shape_and_at_least_float32(pair, dtype, batch, shape, seed):
    class Zero(nn.Module):
        def forward(self, x, c_noise):
            assert c_noise.shape == x.shape[:1]
            return torch.zeros_like(x)

    objective = ld.DiffusionObjective(pair[0], ld.UniformTime(), pair[1], ld.EDMWeighting())
    x0 = draw(seed, batch, *shape, dtype=dtype)[0]
    report = objective.loss(Zero(), x0, key=ld.RandomKey(seed))
    assert report.per_sample.shape == report.level.alpha.shape == (batch,)
    assert report.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert report.loss >= 0


@given(st.sampled_from(CONTINUOUS), st.floats(1e-6, 1 - 1e-6))
def test_time_is_the_inverse_of_log_snr(schedule, t):
    time = torch.tensor([t], dtype=torch.float64)
    assert_close(schedule.time(schedule.log_snr(time)), time, rtol=1e-9, atol=1e-12)


@given(st.sampled_from(SCHEDULES), st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_snr_falls_with_time(schedule, times):
    log_snr = schedule.log_snr(torch.tensor(sorted(times), dtype=torch.float64))
    assert (log_snr[1:] <= log_snr[:-1]).all()


@given(st.sampled_from(SCHEDULES), st.floats(-30, 30))
def test_a_level_knows_its_log_snr(schedule, log_snr):
    at = torch.tensor([log_snr], dtype=torch.float64)
    assert_close(schedule.at(at).log_snr, at, rtol=1e-9, atol=1e-9)


@given(
    st.sampled_from(DENSITIES),
    st.sampled_from(PROCESSES),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_the_global_batch_is_dealt_out_whatever_the_density(density, schedule, batch, ranks, accumulate):
    """Levels of all ranks, interleaved, are those of one process with the whole batch."""
    key = {"seed": 2, "epoch": 1, "batch": 4, "accumulate": accumulate}
    alone = density.draw(batch * ranks, schedule, ld.RandomKey(**key))
    parts = [
        density.draw(batch, schedule, ld.RandomKey(**key, rank=r, world_size=ranks)) for r in range(ranks)
    ]
    assert torch.equal(torch.stack(parts, 1).flatten(), alone)


@given(st.floats(-4, 4), st.floats(0.2, 3), st.floats(0.05, 0.95))
def test_log_normal_sigma_has_its_quantiles(mean, std, u):
    """Against the normal distribution of another library."""
    expected = -2 * torch.distributions.Normal(mean, std).icdf(torch.tensor([u]))
    found = ld.LogNormalSigma(mean, std).quantile(torch.tensor([u], dtype=torch.float64), PROCESSES[0])
    assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


@given(
    st.lists(st.floats(-5, 5), min_size=3, max_size=6, unique=True),
    st.lists(st.floats(-8, 8), min_size=6, max_size=6),
)
def test_tabulated_densities_invert_themselves(knots, heights):
    knots = [round(knot, 2) for knot in sorted(knots)]
    if len(set(knots)) < len(knots):
        return
    density = ld.TabulatedDensity(tuple(knots), tuple(heights[: len(knots)]))
    u = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    log_snr = density.quantile(u, PROCESSES[0])
    assert_close(density.share_above(log_snr, PROCESSES[0]), u, rtol=1e-9, atol=1e-9)
    inside = torch.linspace(knots[0], knots[-1], 200_001, dtype=torch.float64)
    mass = torch.trapezoid(density.log_prob(inside, PROCESSES[0]).exp(), inside)
    assert mass.item() == pytest.approx(1, abs=1e-4)
