"""What x_t tells of each target, exactly and by Monte Carlo."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightning_diffusion as ld
from lightning_diffusion.analysis.information import GaussianMixture, information_curves

REFERENCE = json.loads((Path(__file__).parent / "reference" / "gaussian_mixture_1d.json").read_text())
LOG_SNR = torch.linspace(-12, 12, 25, dtype=torch.float64)
VP, FLOW, EDM = ld.ContinuousCosineSchedule(), ld.FlowSchedule(), ld.EDMSchedule()
CURVES = ("x0", "epsilon", "v")
X = torch.linspace(-60, 60, 60_001, dtype=torch.float64)


def one_dimension() -> GaussianMixture:
    return GaussianMixture(REFERENCE["weights"], [[mean] for mean in REFERENCE["means"]], REFERENCE["stds"])


def standard_normal(dimensions: int) -> GaussianMixture:
    return GaussianMixture([1.0], [[0.0] * dimensions], [1.0])


def line_and_space(dimensions: int) -> tuple[GaussianMixture, GaussianMixture]:
    """Components of one width on a line, alone and with the other dimensions."""
    means = torch.tensor([[-2.0], [0.5], [1.5]], dtype=torch.float64)
    weights, stds = torch.tensor([0.2, 0.3, 0.5]), torch.full((3,), 0.3)
    direction = torch.nn.functional.normalize(torch.arange(1.0, dimensions + 1).double(), dim=0)
    return GaussianMixture(weights, means, stds), GaussianMixture(weights, means * direction, stds)


def entropy(mixture: GaussianMixture, p: Tensor, q: Tensor) -> Tensor:
    """Of p x_0 + q eps, by the trapezoidal rule on its density."""
    deviation = (p**2 * mixture.stds**2 + q**2).sqrt()
    z = (X[:, None] - p * mixture.means[:, 0]) / deviation
    density = (mixture.weights * (-(z**2) / 2).exp() / deviation).sum(1) / math.sqrt(2 * math.pi)
    return -torch.trapezoid(density.xlogy(density), X)


def by_entropies(mixture: GaussianMixture, target: ld.Target, level: ld.NoiseLevel) -> Tensor:
    """I(y; x_t) = h(y) + h(x_t) - h(y, x_t); (x_0, eps) -> (y, x_t) multiplies volumes by |D|."""
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    joint = entropy(mixture, one, zero) + entropy(mixture, zero, one) + target.determinant(level).abs().log()
    return entropy(mixture, *target.row(level)) + entropy(mixture, *level) - joint


def test_curves_meet_the_reference() -> None:
    rows = REFERENCE["rows"]
    curves = information_curves(one_dimension(), torch.tensor([row["log_snr"] for row in rows]))
    expected = torch.tensor([row["mutual_information_x0"] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(curves.x0.value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=repr)
@pytest.mark.parametrize("target", [ld.X0(), ld.Epsilon(), ld.V(), ld.Score(), ld.Flow()], ids=repr)
def test_information_in_one_dimension_is_the_difference_of_entropies(
    target: ld.Target, schedule: ld.Schedule
) -> None:
    for log_snr in (-3.0, 0.0, 2.5):
        level = schedule.at(torch.tensor([log_snr], dtype=torch.float64))
        expected = by_entropies(one_dimension(), target, level)
        found = one_dimension().mutual_information(level, target=target)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["epsilon", "v"])
def test_curves_change_as_the_error_says(name: str) -> None:
    """dI(eps; x_t) = (mmse_eps - 1) / 2 dlog_snr, dI(v; x_t) = (mmse_eps(l) - mmse_eps(-l) - tanh(l/2)) / 2 dl."""
    mixture, step = one_dimension(), 1e-3
    high, low = (getattr(information_curves(mixture, LOG_SNR + s), name).value for s in (step, -step))
    ahead, back = (at.exp() * mixture.mmse(VP.at(at)) for at in (LOG_SNR, -LOG_SNR))
    slope = {"epsilon": ahead - 1, "v": ahead - back - (LOG_SNR / 2).tanh()}[name] / 2
    torch.testing.assert_close((high - low) / (2 * step), slope, rtol=1e-4, atol=1e-8)


def test_clean_data_become_known_noise_unknown_and_v_is_an_arch() -> None:
    """Ends, rising, falling, and positive between two zeros."""
    ends = torch.tensor([-torch.inf, torch.inf])
    x0, epsilon, v = (curve.value for curve in information_curves(one_dimension(), ends)[1:])
    torch.testing.assert_close(x0, torch.tensor([0, torch.inf]).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(epsilon, torch.tensor([torch.inf, 0]).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(v, torch.zeros(2).double(), atol=1e-12, rtol=0)
    x0, epsilon, v = (curve.value for curve in information_curves(one_dimension(), LOG_SNR)[1:])
    assert (x0.diff() > 0).all()
    assert (epsilon.diff() < 0).all()
    assert (v > 0).all()
    assert v.argmax() == 12
    assert (v[:13].diff() > 0).all()
    torch.testing.assert_close(v, v.flip(0))  # x_t and v change places at -log_snr


@pytest.mark.parametrize("dimensions", [1, 5])
def test_v_tells_nothing_of_a_standard_normal(dimensions: int) -> None:
    """x_t and v are then a rotation of two independent standard normals."""
    curves = information_curves(standard_normal(dimensions), LOG_SNR)
    torch.testing.assert_close(curves.v.value, torch.zeros(25).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(curves.x0.value, dimensions / 2 * LOG_SNR.exp().log1p())
    torch.testing.assert_close(curves.epsilon.value, dimensions / 2 * LOG_SNR.neg().exp().log1p())


@pytest.mark.parametrize("dimensions", [2, 8])
def test_more_dimensions_are_a_line_and_gaussian_channels(dimensions: int) -> None:
    """Across the line x_0 ~ N(0, s^2): a channel I = -1/2 ln(1 - rho^2) per dimension; rho from covariances."""
    line, space = line_and_space(dimensions)
    level = VP.at(LOG_SNR)
    found, alone = information_curves(space, LOG_SNR), information_curves(line, LOG_SNR)
    for name, target in zip(CURVES, (ld.X0(), ld.Epsilon(), ld.V()), strict=True):
        p, q = target.row(level)
        covariance = level.alpha * p * 0.09 + level.sigma * q
        rho2 = covariance**2 / ((p**2 * 0.09 + q**2) * level.variance(0.3))
        exact = getattr(alone, name).value - (dimensions - 1) / 2 * (-rho2).log1p()
        value, error = getattr(found, name)
        assert ((value - exact).abs() < 3 * error + 1e-6 * exact).all(), name
        assert (error < 0.02 * exact).all(), name


def test_errors_cancel_where_information_ends() -> None:
    """The three terms of I(v; x_t) share their draws: at the ends the error is far below that of a single term."""
    _, space = line_and_space(4)
    at = torch.tensor([-16.0, 0.0, 16.0])
    error = information_curves(space, at).v.standard_error
    assert error[0] < 0.03 * error[1]
    assert error[2] < 0.03 * error[1]


def test_a_finite_set_saturates_at_its_entropy_and_gives_the_noise_away() -> None:
    atoms = GaussianMixture([0.25, 0.75], [[-1.0], [1.0]], [0.0, 0.0])
    x0, epsilon, v = (curve.value for curve in information_curves(atoms, torch.tensor([0.0, 12.0]))[1:])
    assert x0[1] == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), rel=1e-9)
    assert epsilon.isinf().all()
    assert v.isinf().all()


@pytest.mark.parametrize("log_snr", [-torch.inf, torch.inf])
def test_the_score_is_the_noise_at_both_ends(log_snr: float) -> None:
    level = VP.at(torch.tensor([log_snr], dtype=torch.float64))
    of = [one_dimension().mutual_information(level, target=target) for target in (ld.Score(), ld.Epsilon())]
    assert torch.equal(*of)
