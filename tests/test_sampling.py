"""Samplers against reference trajectories, exact distributions, and each other."""

import json
from pathlib import Path

import pytest
import torch
from cases import SAMPLERS, SCHEDULES
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion import NoiseLevel
from lightning_diffusion.sampling import posterior_mean, posterior_variance

REFERENCE = json.loads((Path(__file__).parent / "reference" / "samplers.json").read_text())


def gaussian_denoiser(mean, std):
    """E[x_0 | x_t] for independent x_0 ~ N(mean, std^2)."""

    def denoise(x_t, level):
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x_t - alpha * mean)

    return denoise


MEAN, STD = torch.tensor([0.6, -0.4, 0.1]).double(), torch.tensor([0.5, 0.2, 0.9]).double()


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (ld.Euler(12), "euler"),
        (ld.Heun(12), "heun"),
        (ld.DDIM(12), "euler"),
        (ld.DPMSolver2M(12), "dpmpp_2m"),
    ],
)
def test_trajectories_agree_with_reference(sampler, name):
    start = torch.tensor(REFERENCE["start"], dtype=torch.float64)
    denoiser = gaussian_denoiser(
        torch.tensor(REFERENCE["mean"]).double(), torch.tensor(REFERENCE["std"]).double()
    )
    drawn = sampler(denoiser, start / REFERENCE["sigma_max"], ld.EDMSchedule())
    assert_close(drawn, torch.tensor(REFERENCE[f"sample_{name}"]).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_single_point_is_drawn_exactly(sampler, schedule):
    """Data at one point: the denoiser is constant and every sampler ends there."""
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    drawn = sampler(lambda x, level: MEAN.expand_as(x), noise, schedule, torch.Generator().manual_seed(1))
    assert_close(drawn, MEAN.expand(5, 3))


FINE = [
    ld.Euler(1000),
    ld.Heun(500),
    ld.Heun(500, churn=ld.Churn(amount=20.0)),
    ld.DPMSolver2M(500),
    ld.DDIM(1000, eta=0.7),
    ld.Ancestral(1000),
]


@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[4]], ids=repr)
@pytest.mark.parametrize("sampler", FINE, ids=repr)
def test_gaussian_data_come_out_with_their_mean_and_deviation(sampler, schedule):
    """With steps enough: the samplers' own bias falls as one over their number."""
    noise = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(2)).double()
    drawn = sampler(gaussian_denoiser(MEAN, STD), noise, schedule, torch.Generator().manual_seed(3))
    assert_close(drawn.mean(0), MEAN, rtol=0, atol=0.03)
    assert_close(drawn.std(0), STD, rtol=0.03, atol=0)


def errors_in_the_middle(kind, schedule, log_snr_between):
    """At 40 and at 80 steps, on the smooth middle of the process only, so that the order shows."""
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(4)).double()

    class Middle(type(schedule)):
        def sampling_levels(self, num_steps):
            return self.at(log_snr_between(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)))

    draw = lambda sampler: sampler(gaussian_denoiser(MEAN, STD), noise, Middle())  # noqa: E731
    exact = draw(ld.Heun(1000))
    return [(draw(kind(n)) - exact).norm().item() for n in (40, 80)]


@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[2], ld.FlowSchedule()], ids=repr)
@pytest.mark.parametrize(("kind", "order"), [(ld.Euler, 1), (ld.Heun, 2), (ld.DPMSolver2M, 2)])
@pytest.mark.parametrize("shape", [lambda u: 6 * u - 3, lambda u: 6 * u**1.5 - 3], ids=["even", "uneven"])
def test_halving_the_steps_divides_the_error_by_two_to_the_order(schedule, kind, order, shape):
    """On a smooth problem, from some step on; multistep methods must know that steps may differ in size."""
    coarse, fine = errors_in_the_middle(kind, schedule, shape)
    assert coarse / fine == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_multistep_sampler_evaluates_once_per_step_and_forgets_between_calls(schedule):
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(9)).double()
    calls, denoiser, sampler = [], gaussian_denoiser(MEAN, STD), ld.DPMSolver2M(7)
    counted = lambda x, level: (calls.append(level), denoiser(x, level))[1]  # noqa: E731
    first, again = (sampler(counted, noise, schedule) for _ in range(2))
    assert len(calls) == 14
    assert torch.equal(first, again)
    assert first.isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_heun_is_no_worse_than_euler_on_any_schedule(schedule):
    """The exact map of Gaussian data; the cosine table begins at sigma / alpha = 2e4, far from its next level."""
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(4)).double()
    exact, denoiser = MEAN + STD * noise, gaussian_denoiser(MEAN, STD)
    heun, euler = ((sampler(18)(denoiser, noise, schedule) - exact).norm() for sampler in (ld.Heun, ld.Euler))
    assert heun < 1.1 * euler


def test_ancestral_and_ddim_with_full_noise_are_the_same():
    noise = torch.randn(6, 3, generator=torch.Generator().manual_seed(5)).double()
    drawn = [
        sampler(gaussian_denoiser(MEAN, STD), noise, ld.LinearSchedule(), torch.Generator().manual_seed(6))
        for sampler in (ld.Ancestral(100), ld.DDIM(100, eta=1.0))
    ]
    assert_close(*drawn)


def test_posterior_is_that_of_ddpm_in_all_its_forms():
    """Neighbouring entries of a table: the printed forms for x_0, epsilon, v and score (Ho et al. 2020, eq. 7 on)."""
    schedule = ld.LinearSchedule()
    t = torch.tensor([1, 2, 500, 999])
    abar, before, a = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1], 1 - schedule.betas[t]
    x0, noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    level, end = NoiseLevel(abar.sqrt(), (1 - abar).sqrt()), NoiseLevel(before.sqrt(), (1 - before).sqrt())
    x_t = level.diffuse(x0, noise)
    v, score = abar.sqrt() * noise - (1 - abar).sqrt() * x0, -noise / (1 - abar).sqrt()
    forms = {
        "x0": (a.sqrt() * (1 - before) * x_t + before.sqrt() * (1 - a) * x0) / (1 - abar),
        "epsilon": (x_t - (1 - a) / (1 - abar).sqrt() * noise) / a.sqrt(),
        "v": a.sqrt() * x_t - (1 - a) * before.sqrt() / (1 - abar).sqrt() * v,
        "score": (x_t + (1 - a) * score) / a.sqrt(),
    }
    for form in forms.values():
        assert_close(posterior_mean(x_t, x0, level, end), form, rtol=1e-9, atol=1e-9)
    assert_close(posterior_variance(level, end), (1 - before) / (1 - abar) * schedule.betas[t])


def test_churn_off_is_the_deterministic_sampler():
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(8)).double()
    outside = ld.Heun(12, churn=ld.Churn(amount=40.0, sigma_min=100.0))
    drawn = [s(gaussian_denoiser(MEAN, STD), noise, ld.EDMSchedule()) for s in (ld.Heun(12), outside)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_state_keeps_its_dtype_though_the_denoiser_answers_in_bfloat16(sampler):
    drawn = sampler(lambda x, level: x.bfloat16() * 0, torch.ones(2, 3), ld.EDMSchedule(), torch.Generator())
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
def test_guidance_extrapolates_from_unconditional_to_conditional(scale):
    c, u = torch.tensor([[2.0]]), torch.tensor([[0.5]])
    level = NoiseLevel(torch.ones(1), torch.ones(1))
    guided = ld.ClassifierFree(scale)(lambda x, level: c, lambda x, level: u)
    assert_close(guided(torch.zeros(1, 1), level), (1 - scale) * u + scale * c)


def test_guidance_of_scale_one_costs_nothing():
    def never(x, level):
        raise AssertionError("the unconditional denoiser was called")

    def conditional(x, level):
        return x

    assert ld.ClassifierFree(1.0)(conditional, never) is conditional
