"""Preconditioning: reference numbers, exact second moments, and one residual for every target."""

import json
from pathlib import Path

import pytest
import torch
from cases import DISCRETE, PRECONDITIONINGS, SCHEDULES, TARGETS, refused
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion import NoiseLevel

ROWS = json.loads((Path(__file__).parent / "reference" / "preconditioning.json").read_text())["rows"]
NAMES = {"x0": ld.X0(), "epsilon": ld.Epsilon(), "v": ld.V(), "score": ld.Score(), "flow": ld.Flow()}
FULL = [p for p in PRECONDITIONINGS if isinstance(p, ld.EDMPreconditioning)]


def level_of(*pairs):
    return NoiseLevel(*torch.tensor(pairs, dtype=torch.float64).T)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['alpha']}-{row['sigma']}-{row['sigma_data']}")
@pytest.mark.parametrize("name", NAMES)
def test_coefficients_agree_with_reference(row, name):
    c = ld.EDMPreconditioning(NAMES[name], row["sigma_data"])(level_of((row["alpha"], row["sigma"])))
    assert c.c_in.item() == pytest.approx(row["c_in"], rel=1e-9)
    assert c.c_skip.item() == pytest.approx(row[name]["c_skip"], rel=1e-9, abs=1e-12)
    assert c.c_out.abs().item() == pytest.approx(row[name]["c_out_abs"], rel=1e-9)


def _levels(schedule):
    return schedule(torch.linspace(0, 1, 41, dtype=torch.float64))


@pytest.mark.parametrize("preconditioning", FULL, ids=repr)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_network_sees_and_learns_unit_variance_uncorrelated_with_each_other(schedule, preconditioning):
    """Exact moments: x_0 and eps enter as unit vectors, so that coefficients are covariances."""
    level, sd = _levels(schedule), preconditioning.sigma_data
    n = len(level.alpha)
    data, noise = (
        torch.tensor([[sd, 0.0]]).expand(n, 2).double(),
        torch.tensor([[0.0, 1.0]]).expand(n, 2).double(),
    )
    x_t = level.diffuse(data, noise) * preconditioning(level).c_in[:, None]
    residual = preconditioning.residual(data, noise, level)
    assert_close((x_t**2).sum(1), torch.ones(n).double())
    assert_close((residual**2).sum(1), torch.ones(n).double())
    assert_close((x_t * residual).sum(1), torch.zeros(n).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS, ids=repr)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_residual_is_what_the_coefficients_say(schedule, preconditioning):
    """R = (y - c_skip x_t) / c_out formed from the target, where that is not 0/0."""
    if refused(schedule, preconditioning):
        pytest.skip("refused by the objective")
    level = _levels(schedule)
    c_out = preconditioning(level).c_out.abs()
    keep = (c_out > 1e-4) & c_out.isfinite()
    level = NoiseLevel(level.alpha[keep], level.sigma[keep])
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, len(level.alpha), 5, generator=generator, dtype=torch.float64)
    c = preconditioning(level)
    y, x_t = preconditioning.target.of(x0, noise, level), level.diffuse(x0, noise)
    assert_close(
        preconditioning.residual(x0, noise, level),
        (y - c.c_skip[:, None] * x_t) / c.c_out[:, None],
        rtol=1e-8,
        atol=1e-8,
    )


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS, ids=repr)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_exact_output_gives_the_data_back(schedule, preconditioning):
    if refused(schedule, preconditioning):
        pytest.skip("refused by the objective")
    level = _levels(schedule)
    generator = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(2, len(level.alpha), 5, generator=generator, dtype=torch.float64)
    output = preconditioning.residual(x0, noise, level)
    assert_close(preconditioning.to_x0(output, level.diffuse(x0, noise), level), x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS, ids=repr)
def test_output_determinant_is_the_scale_of_output_errors(preconditioning):
    """|F - R| sigma = |D_F| |x_0_hat - x_0|, from the map that sampling uses."""
    level = level_of((0.9, 0.4), (0.3, 0.95), (1.0, 7.0))
    x_t = torch.randn(3, 5, generator=torch.Generator().manual_seed(3)).double()
    change = preconditioning.to_x0(torch.ones_like(x_t), x_t, level) - preconditioning.to_x0(
        torch.zeros_like(x_t), x_t, level
    )
    D = preconditioning.determinant(preconditioning.output_space, level)[:, None]
    assert_close(level.sigma[:, None].expand(3, 5), D.abs() * change.abs())


def test_the_target_does_not_change_the_regression():
    level = level_of((1.0, 0.002), (0.7, 0.7), (0.0, 1.0), (1.0, 80.0))
    x0, noise = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(4)).double()
    residuals = [ld.EDMPreconditioning(target, 0.7).residual(x0, noise, level) for target in TARGETS]
    assert all(torch.equal(residual, residuals[0]) for residual in residuals)


@pytest.mark.parametrize("preconditioning", FULL, ids=repr)
def test_ends_of_the_axis_are_finite(preconditioning):
    level = NoiseLevel(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1e-20]))
    x = torch.ones(3, 2)
    assert preconditioning(level).c_noise.isfinite().all()
    assert preconditioning.residual(x, x, level).isfinite().all()
    assert preconditioning.to_x0(x, x, level).isfinite().all()


@pytest.mark.parametrize("schedule", DISCRETE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_timestep_is_the_table_index(schedule, dtype):
    level = schedule.at(schedule.log_snrs)
    level = NoiseLevel(level.alpha.to(dtype), level.sigma.to(dtype))
    assert_close(ld.Timestep(schedule)(level), torch.arange(schedule.num_steps, dtype=dtype))


def test_log_sigma_is_a_quarter_of_the_log_of_sigma():
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    assert_close(ld.LogSigma()(NoiseLevel(torch.ones(3).double(), sigma)), sigma.log() / 4)


@pytest.mark.parametrize("make", [ld.EDMPreconditioning, ld.DDPMPreconditioning])
def test_deviation_must_be_positive(make):
    with pytest.raises(ValueError, match="above 0"):
        make(sigma_data=0.0)
