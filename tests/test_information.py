import json
import math
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lightning_diffusion import EDMSchedule, Heun, NoiseLevel
from lightning_diffusion.analysis.information import GaussianMixture

REFERENCE = json.loads((Path(__file__).parent / "reference" / "gaussian_mixture_1d.json").read_text())
PATH = "lightning_diffusion.analysis.information.GaussianMixture"
ENDS = NoiseLevel(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1e-12]))


def one_dimension() -> GaussianMixture:
    return GaussianMixture(
        torch.tensor(REFERENCE["weights"]),
        torch.tensor(REFERENCE["means"])[:, None],
        torch.tensor(REFERENCE["stds"]),
    )


def embedded(dimensions: int) -> GaussianMixture:
    """Four well separated components in general position, of different widths."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, dimensions, generator=generator, dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.1, 0.2, 0.3, 0.4]), means, torch.tensor([0.1, 0.2, 0.3, 0.4]))


def vp(log_snr: Tensor) -> NoiseLevel:
    return NoiseLevel(log_snr.sigmoid().sqrt(), log_snr.neg().sigmoid().sqrt())


def column(name: str) -> Tensor:
    return torch.tensor([row[name] for row in REFERENCE["rows"]], dtype=torch.float64)


def test_error_and_information_in_one_dimension_agree_with_the_reference() -> None:
    level = NoiseLevel(column("alpha"), column("sigma"))
    torch.testing.assert_close(one_dimension().mmse(level), column("mmse_x0"), rtol=1e-6, atol=0)
    information = one_dimension().mutual_information(level)
    torch.testing.assert_close(information, column("mutual_information_x0"), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("stds", [(0.1, 0.2), (1.0, 1e-3), (0.0, 0.5)], ids=str)
def test_information_grows_with_snr_at_half_the_error(stds: tuple[float, float]) -> None:
    """I-MMSE (Guo et al. 2005): dI/dSNR = mmse / 2, so dI/dlog_snr = SNR mmse / 2; central differences."""
    mixture = GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.6]]), torch.tensor(stds))
    log_snr, step = torch.linspace(-6, 10, 17, dtype=torch.float64), 1e-3
    rise = mixture.mutual_information(vp(log_snr + step)) - mixture.mutual_information(vp(log_snr - step))
    expected = log_snr.exp() * mixture.mmse(vp(log_snr)) / 2
    torch.testing.assert_close(rise / (2 * step), expected, rtol=1e-5, atol=1e-8)


def test_one_component_is_the_gaussian_channel() -> None:
    """mmse = D s^2 / (1 + SNR s^2), I = D/2 ln(1 + SNR s^2)."""
    mixture = GaussianMixture(torch.ones(1), torch.full((1, 5), 3.0), torch.tensor([0.5]))
    level = vp(torch.linspace(-8, 8, 9, dtype=torch.float64))
    signal = level.snr * 0.25
    torch.testing.assert_close(mixture.mmse(level), 5 * 0.25 / (1 + signal))
    torch.testing.assert_close(mixture.mutual_information(level), 2.5 * signal.log1p())


def test_more_dimensions_agree_with_quadrature_within_three_standard_errors() -> None:
    """The reference mixture on a line in 3-D, its other dimensions cut off by making it widthless."""
    line = GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.6]]), torch.zeros(2))
    direction = torch.tensor([[2.0, -1.0, 2.0]], dtype=torch.float64) / 3
    space = GaussianMixture(line.weights, line.means * direction, line.stds)
    level = vp(torch.linspace(-4, 3, 8, dtype=torch.float64))
    for name in ("estimate_mmse", "estimate_mutual_information"):
        (value, error), exact = getattr(space, name)(level), getattr(line, name)(level).value
        assert ((value - exact).abs() < 3 * error + 1e-9).all(), name
        assert (error < 0.02 * exact + 1e-3).all(), name


@pytest.mark.parametrize("dimensions", [1, 2, 64])
def test_the_denoiser_attains_the_least_error(dimensions: int) -> None:
    """Its mean squared error on fresh data is `mmse`, and moving it in either direction adds to it."""
    mixture, generator = embedded(dimensions), torch.Generator().manual_seed(1)
    x0 = mixture.sample(20_000, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    for log_snr in (-4.0, 0.0, 4.0):
        level = vp(torch.full((len(x0),), log_snr, dtype=torch.float64))
        x0_hat = mixture.denoise(level.diffuse(x0, noise), level)
        error = (x0 - x0_hat).square().sum(1)
        value, standard_error = mixture.estimate_mmse(NoiseLevel(level.alpha[:1], level.sigma[:1]))
        uncertainty = (error.var() / len(error) + standard_error**2).sqrt()
        assert (error.mean() - value).abs() < 3.5 * uncertainty
        assert all((x0 - c * x0_hat).square().sum(1).mean() > error.mean() for c in (0.95, 1.05))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_the_denoiser_follows_the_score(dimensions: int) -> None:
    """Tweedie: alpha E[x_0 | x_t] = x_t + sigma^2 grad log p(x_t), by autograd."""
    mixture = embedded(dimensions)
    level = vp(torch.linspace(-5, 5, 11, dtype=torch.float64))
    x_t = torch.randn(11, dimensions, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (score,) = torch.autograd.grad(mixture.log_prob(x_t.requires_grad_(), level).sum(), x_t)
    expected = (x_t + level.sigma[:, None] ** 2 * score) / level.alpha[:, None]
    torch.testing.assert_close(mixture.denoise(x_t, level), expected)


def test_the_exact_denoiser_draws_the_mixture() -> None:
    """In one dimension the probability flow keeps order: it maps each quantile of the noise to the data's."""
    mixture = one_dimension()
    share = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    drawn = Heun(100)(mixture.denoise, torch.special.ndtri(share)[:, None], EDMSchedule())
    below = torch.special.ndtr((drawn - mixture.means.T) / mixture.stds) @ mixture.weights
    torch.testing.assert_close(below, share, atol=2e-3, rtol=0)


def test_images_keep_their_shape_and_dtype() -> None:
    mixture, level = embedded(16), NoiseLevel(torch.ones(2), torch.ones(2))
    x_t = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    x0_hat = mixture.denoise(x_t, level)
    assert x0_hat.dtype == torch.float32
    flat = mixture.denoise(x_t.flatten(1).double(), level)
    torch.testing.assert_close(x0_hat.double().flatten(1), flat, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stds", [(0.1, 0.2), (0.0, 0.0), (0.0, 0.3)], ids=str)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_both_ends_are_finite(stds: tuple[float, float], dimensions: int) -> None:
    """Pure noise leaves the prior, clean data leave no error."""
    means = torch.tensor([[-1.0], [0.6]]).expand(2, dimensions)
    mixture = GaussianMixture(torch.tensor([0.3, 0.7]), means, torch.tensor(stds))
    prior_mean = mixture.weights @ mixture.means
    variance = mixture.weights @ (mixture.stds**2 * dimensions + (mixture.means - prior_mean).square().sum(1))
    x_t = torch.stack([torch.full((dimensions,), 5.0), *mixture.means[[0, 0]]])
    expected = torch.stack([prior_mean, *mixture.means[[0, 0]]])
    torch.testing.assert_close(mixture.denoise(x_t.double(), ENDS), expected)
    least = torch.stack([variance, torch.zeros_like(variance), torch.zeros_like(variance)])
    torch.testing.assert_close(mixture.mmse(ENDS), least, atol=1e-12, rtol=1e-9)


def test_information_ends_at_zero_and_at_the_entropy_of_a_finite_set() -> None:
    weights = torch.tensor([0.25, 0.75])
    atoms = GaussianMixture(weights, torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    expected = torch.tensor([0.0, entropy, entropy], dtype=torch.float64)
    torch.testing.assert_close(atoms.mutual_information(ENDS), expected, atol=1e-12, rtol=0)
    assert one_dimension().mutual_information(ENDS)[1] == math.inf


def test_samples_have_the_moments_and_repeat_with_their_generator() -> None:
    mixture = embedded(2)
    x = mixture.sample(50_000, torch.Generator().manual_seed(4))
    mean = mixture.weights @ mixture.means
    assert ((x.mean(0) - mean).abs() < 3.5 * x.std(0) / 50_000**0.5).all()
    assert torch.equal(x, mixture.sample(50_000, torch.Generator().manual_seed(4)))


def test_densities_integrate_to_one() -> None:
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    total = torch.trapezoid(one_dimension().log_prob(x[:, None]).exp(), x)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(
    ("weights", "means", "stds", "message"),
    [
        ([0.5, 0.5], [0.0, 1.0], [1.0, 1.0], r"\(2,\), \(2,\) and \(2,\), expected \(K,\), \(K, D\)"),
        ([0.5, 0.6], [[0.0], [1.0]], [1.0, 1.0], "sum to 1"),
        ([0.5, 0.5], [[0.0], [1.0]], [1.0, -1.0], "0 or more"),
        ([0.5, 0.5], [[0.0], [math.nan]], [1.0, 1.0], "finite means"),
    ],
)
def test_what_is_no_mixture_is_refused(
    weights: list[float], means: object, stds: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(weights, means, stds)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_mixture_is_made_from_plain_lists_as_yaml_holds_them() -> None:
    class Data:
        def __init__(self, mixture: GaussianMixture) -> None:
            self.mixture = mixture

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Data, "data")
    names = ("weights", "means", "stds")
    lists = {name: getattr(one_dimension(), name).tolist() for name in names}
    config = parser.parse_object({"data": {"mixture": {"class_path": PATH, "init_args": lists}}})
    mixture = parser.instantiate_classes(config).data.mixture
    assert all(torch.equal(getattr(mixture, name), getattr(one_dimension(), name)) for name in names)
