"""Schedules against reference tables, and what holds for all of them."""

import json
from pathlib import Path

import pytest
import torch
from cases import DISCRETE, SCHEDULES
from torch.testing import assert_close

import lightning_diffusion as ld

REFERENCE = json.loads((Path(__file__).parent / "reference" / "beta_schedules.json").read_text())
TABLES = {
    "linear": ld.LinearSchedule,
    "scaled_linear": ld.ScaledLinearSchedule,
    "squaredcos_cap_v2": ld.CosineSchedule,
    "exponential": ld.ExponentialSchedule,
    "sigmoid": ld.SigmoidSchedule,
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_agree_with_reference(name):
    """The reference was computed in float32."""
    rows, index = REFERENCE["schedules"][name], REFERENCE["index"]
    schedule = TABLES[name]()
    assert_close(schedule.betas[index], torch.tensor(rows["beta"]).double(), rtol=1e-4, atol=0)
    assert_close(schedule.alphas_cumprod[index], torch.tensor(rows["alpha_bar"]).double(), rtol=1e-4, atol=0)
    if "ztsnr_alpha_bar" not in rows:
        return
    rescaled = TABLES[name](zero_terminal_snr=True).alphas_cumprod
    assert_close(rescaled[index], torch.tensor(rows["ztsnr_alpha_bar"]).double(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_noise_grows_along_time_and_log_snr_is_the_coordinate(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    level = schedule(t)
    assert (level.log_snr.diff() <= 0).all()
    assert level.log_snr[0] > level.log_snr[-1]
    again = schedule.at(level.log_snr)
    assert_close(again.alpha, level.alpha)
    assert_close(again.sigma, level.sigma)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_scaling_is_kept(schedule):
    level = schedule.at(torch.linspace(-30, 30, 61, dtype=torch.float64))
    norms = {
        ld.VariancePreserving: level.alpha**2 + level.sigma**2,
        ld.VarianceExploding: level.alpha,
        ld.StraightPath: level.alpha + level.sigma,
    }
    (norm,) = [norm for scaling, norm in norms.items() if isinstance(schedule, scaling)]
    assert_close(norm, torch.ones_like(norm))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_time_is_the_inverse_of_log_snr(schedule):
    n = getattr(schedule, "num_steps", 500)
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert_close(schedule.time(schedule.log_snr(t)), t)


def test_flow_shift_is_a_shift_of_log_snr():
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    shift = ld.FlowSchedule()(t).log_snr - ld.FlowSchedule(shift=3.0)(t).log_snr
    assert_close(shift, torch.full_like(t, 2 * torch.tensor(3.0).double().log().item()))


@pytest.mark.parametrize("schedule", DISCRETE, ids=repr)
def test_pure_noise_and_clean_data_are_finite(schedule):
    level = schedule.at(torch.tensor([-torch.inf, torch.inf]))
    assert level.alpha.tolist() == [0, 1]
    assert level.sigma.tolist() == [1, 0]


@pytest.mark.parametrize("schedule", DISCRETE, ids=repr)
def test_zero_terminal_snr_keeps_the_first_level_and_empties_the_last(schedule):
    plain = type(schedule)(num_steps=schedule.num_steps)
    rescaled = type(schedule)(num_steps=schedule.num_steps, zero_terminal_snr=True)
    assert_close(rescaled.alphas_cumprod[0], plain.alphas_cumprod[0])
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.betas[-1] == 1
    assert rescaled.reaches_zero_snr
    assert not plain.reaches_zero_snr


def test_edm_steps_are_those_of_the_paper():
    """sigma_i of Karras et al. 2022, eq. 5, from the reference's float32 list."""
    reference = json.loads((Path(__file__).parent / "reference" / "samplers.json").read_text())
    level = ld.EDMSchedule().sampling_levels(reference["num_steps"])
    assert_close(level.sigma, torch.tensor(reference["sigmas"], dtype=torch.float64), rtol=1e-6, atol=0)
    assert (level.alpha == 1).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_sampling_levels_fall_from_the_noisiest_to_clean_data(schedule, num_steps):
    level = schedule.sampling_levels(num_steps)
    assert len(level.alpha) == len(level.sigma) == num_steps + 1
    assert_close(
        level.sigma[0] / level.alpha[0],
        schedule(torch.ones(1).double()).sigma[0] / schedule(torch.ones(1).double()).alpha[0],
    )
    assert (level.log_snr.diff() > 0).all()
    assert (level.alpha[-1], level.sigma[-1]) == (1, 0)


@pytest.mark.parametrize("schedule", DISCRETE, ids=repr)
def test_sampling_levels_are_table_entries(schedule):
    level = schedule.sampling_levels(schedule.num_steps)
    assert_close(level.alpha[:-1].flip(0), schedule.alphas_cumprod.sqrt())


@pytest.mark.parametrize("schedule", DISCRETE, ids=repr)
def test_more_sampling_steps_than_entries_are_refused(schedule):
    with pytest.raises(ValueError, match=f"at most the {schedule.num_steps}"):
        schedule.sampling_levels(schedule.num_steps + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ld.EDMSchedule(sigma_min=1.0, sigma_max=0.5), "0 < sigma_min < sigma_max"),
        (lambda: ld.EDMSchedule(rho=0.0), "rho > 0"),
        (lambda: ld.LinearSchedule(beta_min=0.1, beta_max=0.01), "beta_min < beta_max"),
        (lambda: ld.LinearSchedule(beta_max=1.5), "beta_max < 1"),
        (lambda: ld.LinearSchedule(beta_min=-0.1), "0 < beta_min"),
        (lambda: ld.CosineSchedule(num_steps=1), "at least 2"),
        (lambda: ld.GeometricSchedule(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max"),
        (lambda: ld.FlowSchedule(shift=0.0), "shift > 0"),
        (lambda: ld.ExponentialSchedule(beta_min=0.0), "0 < beta_min"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
