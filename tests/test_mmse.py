"""Errors of a denoiser over log-SNR, and the information that they integrate to."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_diffusion as ld
from lightning_diffusion.analysis.information import GaussianMixture
from lightning_diffusion.analysis.mmse import exact_mmse_curve, mmse_curve, module_mmse_curve
from lightning_diffusion.analysis.moments import moments

REFERENCE = json.loads((Path(__file__).parent / "reference" / "gaussian_mixture_1d.json").read_text())
FINE = torch.linspace(-16, 20, 181, dtype=torch.float64)
COARSE = torch.linspace(-10, 10, 41, dtype=torch.float64)
VP = ld.ContinuousCosineSchedule()


def mixture(dimensions: int = 1) -> GaussianMixture:
    if dimensions == 1:
        return GaussianMixture(REFERENCE["weights"], [[m] for m in REFERENCE["means"]], REFERENCE["stds"])
    means = torch.randn(3, dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianMixture([0.2, 0.3, 0.5], means, [0.1, 0.3, 0.5])


def draws(of: GaussianMixture, n: int = 4000) -> Tensor:
    return of.sample(n, torch.Generator().manual_seed(1))


def entropy(of: GaussianMixture) -> Tensor:
    x = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    density = of.log_prob(x[:, None]).exp()
    return -torch.trapezoid(density.xlogy(density), x)


def test_the_exact_curve_and_its_information_meet_the_reference() -> None:
    rows = {row["log_snr"]: row for row in REFERENCE["rows"]}
    curve = exact_mmse_curve(mixture(), FINE)
    chosen = [int((FINE - log_snr).abs().argmin()) for log_snr in rows]
    for name, found in (("mmse_x0", curve.x0), ("mutual_information_x0", curve.mutual_information)):
        expected = torch.tensor([row[name] for row in rows.values()], dtype=torch.float64)
        torch.testing.assert_close(found.value[chosen], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("stds", [(0.1, 0.2), (1.0, 0.3), (0.4, 0.4)], ids=str)
def test_half_the_integral_of_the_error_is_the_information(stds: tuple[float, float]) -> None:
    """I-MMSE at every level, against the quadrature of entropies."""
    of = GaussianMixture([0.3, 0.7], [[-1.0], [0.6]], stds)
    information = exact_mmse_curve(of, FINE).mutual_information
    torch.testing.assert_close(information.value, of.mutual_information(VP.at(FINE)), rtol=1e-6, atol=0)
    assert (information.standard_error == 0).all()


def test_uneven_levels_integrate_too() -> None:
    log_snr = (FINE + 0.08 * (3 * FINE).sin()).sort().values
    information = exact_mmse_curve(mixture(), log_snr).mutual_information.value
    expected = mixture().mutual_information(VP.at(log_snr))
    torch.testing.assert_close(information, expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("levels", [3, 5, 20])
def test_a_standard_normal_needs_few_levels(levels: int) -> None:
    """mmse_eps = D sig(log_snr), I = D/2 ln(1 + SNR), exactly."""
    normal = GaussianMixture([1.0], [[0.0] * 3], [1.0])
    log_snr = torch.linspace(-7, 9, levels, dtype=torch.float64)
    curve = exact_mmse_curve(normal, log_snr)
    torch.testing.assert_close(curve.epsilon.value, 3 * log_snr.sigmoid())
    torch.testing.assert_close(curve.mutual_information.value, 1.5 * log_snr.exp().log1p())


def test_the_exact_bound_is_the_entropy() -> None:
    """From pure noise to clean data nothing is lost; with bins, density times width."""
    curve = exact_mmse_curve(mixture(), FINE)
    bits = entropy(mixture()) / math.log(2)
    assert curve.likelihood_bound().total.value == pytest.approx(bits.item(), abs=1e-6)
    at_8_bits = curve.likelihood_bound(bin_width=2 / 255).total.value
    assert at_8_bits == pytest.approx(bits.item() + 6.994353, abs=2e-6)


def test_a_bound_over_any_range_lies_above_the_entropy() -> None:
    bits = entropy(mixture()) / math.log(2)
    ranges = [(-16, 20), (-3, 20), (-16, 6), (0, 3)]
    totals = [
        exact_mmse_curve(mixture(), torch.linspace(*ends, 101).double()).likelihood_bound().total.value
        for ends in ranges
    ]
    assert all(total > bits + 5e-4 for total in totals[1:])


@pytest.mark.parametrize("dimensions", [1, 6])
def test_the_best_denoiser_meets_the_exact_curve_within_three_standard_errors(dimensions: int) -> None:
    of = mixture(dimensions)
    found, exact = mmse_curve(of.denoise, draws(of), COARSE), exact_mmse_curve(of, COARSE)
    level = VP.at(COARSE)
    pairs = [
        (found.epsilon, exact.epsilon),
        (found.x0, of.estimate_mmse(level)),
        (found.mutual_information, of.estimate_mutual_information(level)),
        *zip(found.likelihood_bound(), exact.likelihood_bound(), strict=True),
    ]
    for mine, theirs in pairs:
        error = (mine.standard_error**2 + theirs.standard_error**2).sqrt()
        assert ((mine.value - theirs.value).abs() < 3 * error + 1e-4 * theirs.value.abs()).all()
    assert (found.epsilon.standard_error < 0.06 * found.epsilon.value).all()


def test_standard_errors_are_the_spread_of_repetitions() -> None:
    """Of 120 curves, for the errors and for integrals, whose errors rest on the covariance between levels."""
    of = mixture()
    curves = [
        mmse_curve(of.denoise, of.sample(50, torch.Generator().manual_seed(i)), COARSE[::8], seed=i)
        for i in range(120)
    ]
    for name in ("epsilon", "x0", "mutual_information"):
        values = torch.stack([getattr(curve, name).value for curve in curves])
        errors = torch.stack([getattr(curve, name).standard_error for curve in curves])
        ratio = errors.square().mean(0).sqrt() / values.std(0)
        assert ((ratio - 1).abs() < 0.3).all(), name


def test_other_denoisers_lie_above() -> None:
    """Of the same data and noise: the mean of the data, and a denoiser that shrinks."""
    of, x0 = mixture(2), draws(mixture(2))
    best = mmse_curve(of.denoise, x0, COARSE)
    shrinking = mmse_curve(lambda x_t, level: 0.9 * of.denoise(x_t, level), x0, COARSE)
    assert (shrinking.epsilon.value > best.epsilon.value).all()
    assert (shrinking.mutual_information.value > best.mutual_information.value).all()


def test_batches_stream_to_the_moments_of_the_whole() -> None:
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 1e4
    found = moments(rows.split(77))
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.covariance, rows.T.cov() / 1000, rtol=1e-9, atol=1e-12)


def test_curves_repeat_with_their_seed_and_take_what_a_loader_yields() -> None:
    of, x0 = mixture(2), draws(mixture(2), 400)
    labels = torch.zeros(200, dtype=torch.int64)
    whole, again, other = (mmse_curve(of.denoise, x0, COARSE, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(whole.epsilon.value, again.epsilon.value)
    assert not torch.equal(whole.epsilon.value, other.epsilon.value)
    pairs = mmse_curve(of.denoise, [(part, labels) for part in x0.split(200)], COARSE)
    dicts = mmse_curve(of.denoise, ({"image": part, "label": labels} for part in x0.split(200)), COARSE)
    assert torch.equal(pairs.epsilon.value, dicts.epsilon.value)


@pytest.mark.parametrize("schedule", [ld.FlowSchedule(), ld.EDMSchedule()], ids=repr)
def test_every_scaling_of_the_process_has_the_same_curve(schedule: ld.Schedule) -> None:
    of, x0 = mixture(2), draws(mixture(2), 300)
    expected = mmse_curve(of.denoise, x0, COARSE)
    torch.testing.assert_close(
        mmse_curve(of.denoise, x0, COARSE, schedule=schedule).epsilon, expected.epsilon
    )


class Zero(nn.Module):
    """The best network for N(0, sigma_data^2) under EDM preconditioning; notes its labels."""

    num_classes, image_shape = 10, (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        assert not self.training
        self.labels.append(label)
        return self.gain * x


def test_an_objective_is_a_denoiser() -> None:
    """N(0, 0.5^2) in 8 dimensions: mmse_eps = D s^2 SNR / (1 + s^2 SNR)."""
    x0 = 0.5 * torch.randn(3000, 8, generator=torch.Generator().manual_seed(5))
    curve = mmse_curve(partial(ld.EDM(sigma_data=0.5).denoise, Zero().eval()), x0, COARSE)
    expected = 8 * (COARSE + 2 * math.log(0.5)).sigmoid()
    assert ((curve.epsilon.value - expected).abs() < 3 * curve.epsilon.standard_error).all()


def test_a_module_is_measured_on_encoded_images_under_their_labels() -> None:
    network, representation = Zero(), ld.Standardize([0.2], [0.25])
    module = ld.DiffusionModule(network, representation=representation)
    images = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(6)) * 2 - 1
    labels = torch.arange(40) % 10
    module.train()
    found = module_mmse_curve(module, [(images, labels)], COARSE)
    assert module.network.training
    assert all(torch.equal(label, labels) for label in module.network.labels)
    schedule, x0 = module.objective.schedule, representation.encode(images)
    direct = mmse_curve(module.eval().denoiser(), x0, COARSE, schedule=schedule)
    assert torch.equal(found.epsilon.value, direct.epsilon.value)


@pytest.mark.parametrize("log_snr", [[0.0], [0.0, 0.0], [1.0, 0.0], [-math.inf, 0.0], [[0.0, 1.0]]], ids=str)
def test_levels_that_are_none_are_refused(log_snr: list[float]) -> None:
    with pytest.raises(ValueError, match=r"expected at least two finite levels that rise"):
        mmse_curve(mixture().denoise, draws(mixture(), 10), torch.tensor(log_snr))


def test_data_that_are_too_few_and_errors_that_are_nan_are_refused() -> None:
    x0 = draws(mixture(), 10)
    with pytest.raises(ValueError, match="Found 1 samples; expected at least two"):
        mmse_curve(mixture().denoise, x0[:1], COARSE)
    with pytest.raises(ValueError, match="Found no data"):
        mmse_curve(mixture().denoise, [], COARSE)

    def broken(x_t: Tensor, level: ld.NoiseLevel) -> Tensor:
        return torch.where(level.log_snr[:, None] > 9.5, torch.nan, x_t)

    with pytest.raises(ValueError, match=r"NaN or infinite at log-SNR \[10\.0\]"):
        mmse_curve(broken, x0, COARSE)
