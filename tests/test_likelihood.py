"""The likelihood bound: against entropies in closed form, in every space that data may be stated in."""

import math
import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_diffusion as ld
from lightning_diffusion.analysis.decoders import Decoder, DiscreteDecoder, GaussianDecoder
from lightning_diffusion.analysis.information import Estimate, GaussianMixture
from lightning_diffusion.analysis.likelihood import LikelihoodBound, likelihood_bound, module_likelihood_bound
from lightning_diffusion.analysis.measuring import Measured, Units
from lightning_diffusion.analysis.mmse import exact_mmse_curve

LN2 = math.log(2)
PLAIN_BITS = math.log2(2 * math.pi * math.e) / 2  # of a standard normal, per dimension


def mixture(dimensions: int) -> GaussianMixture:
    means = torch.randn(3, dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianMixture([0.2, 0.3, 0.5], means, [0.1, 0.3, 0.5])


def draws(of: GaussianMixture, n: int) -> Tensor:
    return of.sample(n, torch.Generator().manual_seed(1))


@cache
def exact_bound(dimensions: int) -> LikelihoodBound:
    log_snr = torch.linspace(-8, 11, 115, dtype=torch.float64)
    return exact_mmse_curve(mixture(dimensions), log_snr).likelihood_bound()


def agrees(found: Estimate, expected: Estimate) -> bool:
    error = (found.standard_error**2 + expected.standard_error**2).sqrt()
    return bool(((found.value - expected.value).abs() <= 3 * error + 1e-9).all())


@pytest.mark.parametrize("levels", [1, 4, 16])
@pytest.mark.parametrize("dimensions", [1, 6])
def test_every_term_agrees_with_the_exact_one_for_any_number_of_levels(dimensions: int, levels: int) -> None:
    of = mixture(dimensions)
    found = likelihood_bound(of.denoise, draws(of, 3000), log_snr_range=(-8, 11), levels=levels)
    assert all(agrees(mine, theirs) for mine, theirs in zip(found, exact_bound(dimensions), strict=True))
    assert found.total.value == pytest.approx(sum(part.value for part in found[1:]).item())


def test_standard_errors_are_the_spread_of_repetitions() -> None:
    of = mixture(2)
    found = [
        likelihood_bound(of.denoise, draws_of, levels=4, seed=seed)
        for seed in range(100)
        for draws_of in [of.sample(40, torch.Generator().manual_seed(seed))]
    ]
    for name in LikelihoodBound._fields:
        values = torch.stack([getattr(bound, name).value for bound in found])
        errors = torch.stack([getattr(bound, name).standard_error for bound in found])
        assert 0.8 < errors.square().mean().sqrt() / values.std() < 1.25, name


def test_a_worse_denoiser_has_a_higher_bound() -> None:
    of = mixture(3)
    best = likelihood_bound(of.denoise, draws(of, 500))
    worse = likelihood_bound(lambda x_t, level: of.denoise(x_t, level) * 0.98, draws(of, 500))
    assert worse.diffusion.value > best.diffusion.value
    assert worse.total.value > best.total.value
    assert worse.prior.value == best.prior.value


def test_prior_terms_are_the_divergence_of_gaussians() -> None:
    """By torch.distributions, for a single x_0."""
    x0 = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64).expand(2, 3)
    for low in (-12.0, -2.0, 1.0):
        level = ld.ContinuousCosineSchedule().at(torch.tensor(low, dtype=torch.float64))
        posterior = torch.distributions.Normal(level.alpha * x0[0], level.sigma)
        standard = torch.distributions.Normal(torch.zeros(3).double(), 1.0)
        expected = torch.distributions.kl_divergence(posterior, standard).sum() / (3 * LN2)
        found = likelihood_bound(lambda x_t, at: x_t, x0, log_snr_range=(low, low + 1), levels=1).prior
        torch.testing.assert_close(found.value, expected, rtol=1e-9, atol=1e-12)
        assert found.standard_error < 1e-12


def test_a_bin_width_is_so_many_bits() -> None:
    """log2(255 / 2) = 6.994 for 8-bit images in [-1, 1]."""
    of = mixture(2)
    plain, at_8_bits = (
        likelihood_bound(of.denoise, draws(of, 50), GaussianDecoder(width), seed=2)
        for width in (1.0, 2 / 255)
    )
    assert at_8_bits.decoder.value - plain.decoder.value == pytest.approx(6.994353, abs=1e-6)
    assert at_8_bits.diffusion.value == plain.diffusion.value


def test_a_finite_set_costs_its_entropy() -> None:
    """Four of 256 values, each dimension alike: with the best denoiser the bound is the entropy, of probabilities."""
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)[[3, 100, 101, 250]]
    weights = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    atoms = GaussianMixture(weights, values[:, None], [0.0] * 4)
    found = likelihood_bound(atoms.denoise, draws(atoms, 4000), DiscreteDecoder(), log_snr_range=(-10, 16))
    entropy = -(weights * weights.log2()).sum()
    assert abs(found.total.value - entropy) < 3 * found.total.standard_error
    assert found.total.standard_error < 0.05 * entropy
    assert 0 <= found.decoder.value < 1e-6


def test_the_discrete_decoder_is_its_softmax() -> None:
    """At noise far above, about and below the step, at both ends of the grid, in float64 over all values."""
    values = torch.linspace(-1, 1, 17, dtype=torch.float64)
    x0 = values[torch.randint(17, (64, 2, 3), generator=torch.Generator().manual_seed(4))]
    for high in (-4.0, 3.0, 5.0, 9.0):
        level = ld.FlowSchedule().at(torch.tensor([high], dtype=torch.float64))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        batch = Measured(lambda x_t, at: x_t, x0, Units(torch.ones(()), torch.zeros(())))
        x_t = level.diffuse(x0, noise)
        logits = -((x_t[..., None] - level.alpha * values) ** 2) / (2 * level.sigma**2)
        index = ((x0 + 1) * 8).round().long()
        expected = nn.functional.cross_entropy(logits.flatten(0, -2), index.flatten(), reduction="none")
        found = DiscreteDecoder(17)(batch, noise, level)
        torch.testing.assert_close(found, expected.reshape(64, -1).sum(1), rtol=1e-9, atol=1e-12)


class Zero(nn.Module):
    """The best network for Gaussian data under EDM preconditioning."""

    num_classes, image_shape = 0, (2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.gain * x


MEAN, STD = torch.tensor([0.1, -0.2])[:, None, None], torch.tensor([0.15, 0.2])[:, None, None]


def gaussian_images(n: int = 600) -> Tensor:
    noise = torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    return (MEAN + STD * noise).clamp(-1, 1)


def gaussian_module() -> ld.DiffusionModule:
    return ld.DiffusionModule(
        Zero(), representation=ld.Standardize(MEAN.flatten().tolist(), STD.flatten().tolist())
    )


def test_a_module_is_measured_in_the_units_of_the_images() -> None:
    """Gaussian pixels, the best network, standardised: the entropy log2(s sqrt(2 pi e)) of the images, not of x_0."""
    expected = PLAIN_BITS + STD.log2().mean()
    found = module_likelihood_bound(gaussian_module(), gaussian_images().split(100), GaussianDecoder())
    assert abs(found.total.value - expected) < 3 * found.total.standard_error
    assert found.total.standard_error < 0.02


def test_8_bit_images_cost_the_entropy_of_the_density_and_of_the_bins() -> None:
    """Bins of a tenth of the deviation hardly change the best denoiser: h + log2(255 / 2)."""
    images = (gaussian_images() * 127.5 + 127.5).round() / 127.5 - 1
    expected = PLAIN_BITS + STD.log2().mean() + math.log2(255 / 2)
    half_a_step = -2 * math.log(0.5 / 127.5 * 0.5 / 0.15)
    for end, allowed in ((half_a_step, 0.003), (None, 0.04), (half_a_step - 2, 0.01)):
        found = module_likelihood_bound(gaussian_module(), [images], log_snr_range=(-10, end), levels=32)
        assert abs(found.total.value - expected) < 3 * found.total.standard_error + allowed
        assert found.total.standard_error < 0.02


def test_the_objective_alone_gives_the_same_bound_of_encoded_data() -> None:
    module, images = gaussian_module(), gaussian_images(200)
    whole = module_likelihood_bound(module, [images], GaussianDecoder())
    x0, schedule = module.representation.encode(images), module.objective.schedule
    alone = likelihood_bound(partial(module.objective.denoise, module.network), x0, schedule=schedule)
    shift = STD.log2().mean() + 1  # from deviation 0.5 to that of the images
    assert whole.total.value == pytest.approx((alone.total.value + shift).item(), abs=1e-5)
    assert whole.diffusion.value.item() == pytest.approx(alone.diffusion.value.item(), rel=1e-4)


class Blurred(ld.Identity):
    """No scale and shift per pixel."""

    def encode(self, images: Tensor) -> Tensor:
        return (images + images.roll(1, -1)) / 2


@pytest.mark.parametrize("decoder", [DiscreteDecoder(), GaussianDecoder()], ids=repr)
def test_a_representation_that_mixes_pixels_is_refused(decoder: Decoder) -> None:
    module = ld.DiffusionModule(Zero(), representation=Blurred())
    with pytest.raises(
        ValueError, match=r"more than scale and shift .* encode the data and call likelihood_bound"
    ):
        module_likelihood_bound(module, [gaussian_images(4)], decoder)


def test_what_cannot_be_is_refused() -> None:
    x0, denoise = draws(mixture(2), 8), mixture(2).denoise
    with pytest.raises(ValueError, match=r"steps off the 256 values from -1 to 1; expected data on them"):
        likelihood_bound(denoise, x0, DiscreteDecoder())
    with pytest.raises(ValueError, match="expected bin_width > 0"):
        GaussianDecoder(0.0)
    with pytest.raises(ValueError, match="at least two values and low < high"):
        DiscreteDecoder(1)
    for ends, levels in (((3.0, 3.0), 4), ((-math.inf, 3.0), 4), ((0.0, 3.0), 0)):
        with pytest.raises(ValueError, match=r"expected finite log-SNRs, the lower first"):
            likelihood_bound(denoise, x0, log_snr_range=ends, levels=levels)
    with pytest.raises(ValueError, match=r"expected finite ones: a denoiser"):
        likelihood_bound(lambda x_t, level: x_t * torch.nan, x0)


def test_the_examples_in_the_docs_run() -> None:
    page = (Path(__file__).parents[1] / "docs" / "information.md").read_text()
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(example, names)
