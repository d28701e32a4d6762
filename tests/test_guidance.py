"""Guidance: what it leaves alone, what it keeps, and where it takes exact denoisers."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.noise_level import NoiseLevel, per_sample

SCALES = [0.0, 0.5, 2.0, 4.0]
SIGMA = torch.tensor([0.05, 0.3, 0.31, 1.0, 3.0, 3.01, 80.0])
LEVEL = NoiseLevel(torch.ones(7), SIGMA)


def fixed(seed, shape=(7, 3, 4, 4), dtype=torch.float32):
    """A denoiser that always answers the same, and counts."""
    answer = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def denoise(x_t, level):
        denoise.calls += 1
        return answer

    denoise.calls = 0
    return denoise, answer


KINDS = [ld.ClassifierFree, partial(ld.AutoGuidance, "runs/small-1")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_only_levels_in_the_interval_are_guided(kind, scale):
    (near, c), (far, _) = fixed(0), fixed(1)
    everywhere = kind(scale)(near, far)(c, LEVEL)
    within = kind(scale, interval=(0.3, 3.0))(near, far)(c, LEVEL)
    inside = torch.tensor([False, False, True, True, True, False, False])
    assert torch.equal(within[inside], everywhere[inside])
    assert torch.equal(within[~inside], c[~inside])
    assert not torch.isclose(everywhere, c).any(0).all()


def test_the_interval_is_of_sigma_over_alpha_on_any_process():
    """Scaling x_t, alpha and sigma together is the same level."""
    (near, c), (far, _) = fixed(0), fixed(1)
    guided = ld.ClassifierFree(2.0, (0.3, 3.0))(near, far)
    preserving = ld.LinearSchedule().at(LEVEL.log_snr)
    straight = ld.FlowSchedule().at(LEVEL.log_snr + 1e-5)
    assert torch.equal(guided(c, preserving)[3], guided(c, LEVEL)[3])
    assert torch.equal(guided(c, straight)[[0, 6]], c[[0, 6]])
    pure_noise = NoiseLevel(torch.zeros(7), torch.ones(7))
    assert torch.equal(guided(c, pure_noise), c)


def test_outside_the_interval_the_second_network_is_not_called():
    (near, c), (far, _) = fixed(0), fixed(1)
    drawn = ld.Euler(10)(ld.ClassifierFree(2.0, (0.3, 3.0))(near, far), c, ld.EDMSchedule())
    levels = ld.EDMSchedule().sampling_levels(10).sigma
    assert near.calls == 10
    assert far.calls == int(((levels > 0.3) & (levels <= 3)).sum()) > 0
    assert drawn.isfinite().all()


@pytest.mark.parametrize("scale", SCALES)
def test_rescaling_gives_the_deviation_back(scale):
    (near, c), (far, _) = fixed(0), fixed(1)
    plain, half, whole = (ld.ClassifierFree(scale, rescale=r)(near, far)(c, LEVEL) for r in (0, 0.5, 1))
    assert_close(whole.flatten(1).std(1), c.flatten(1).std(1))
    assert_close(half, (plain + whole) / 2)
    assert_close(whole / whole.flatten(1).norm(dim=1)[:, None, None, None], plain / per_sample(
        plain.flatten(1).norm(dim=1), plain))  # fmt: skip


def test_rescaling_survives_an_image_without_any_deviation():
    flat = torch.zeros(7, 3, 4, 4)
    guided = ld.ClassifierFree(2.0, rescale=1.0)(lambda x, level: flat, lambda x, level: flat)
    assert torch.equal(guided(flat, LEVEL), flat)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_arithmetic_is_float32_whatever_the_networks_answer_in(rescale):
    """Scale 100 multiplies rounding by a hundred; in bfloat16 nothing of the answer would be left."""
    (near, c), (far, u) = fixed(0, dtype=torch.bfloat16), fixed(1, dtype=torch.bfloat16)
    guided = ld.ClassifierFree(100.0, (0.0, 100.0), rescale)(near, far)(c, LEVEL)
    c, u = c.double(), u.double()
    exact = u + 100 * (c - u)
    share = 1 + rescale * (c.flatten(1).std(1) / exact.flatten(1).std(1) - 1)
    assert guided.dtype == torch.float32
    assert_close(guided.double(), per_sample(share, exact) * exact, rtol=1e-5, atol=1e-4)


def test_float64_stays():
    (near, c), (far, _) = fixed(0, dtype=torch.float64), fixed(1, dtype=torch.float64)
    assert ld.ClassifierFree(2.0, (0.1, 1.0), 0.5)(near, far)(c, LEVEL).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": (3.0, 0.3)}, r"interval=\(3.0, 0.3\); expected 0 <= low < high"),
        ({"interval": (-1.0, 0.3)}, "expected 0 <= low < high"),
        ({"rescale": 1.5}, "rescale=1.5; expected a share between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(2.0, **arguments)


CENTRES = [[0.0, 0.0], [6.0, 0.0], [0.0, 8.0]]


def mixture(std, centres=CENTRES):
    return ld.GaussianMixture([1 / len(centres)] * len(centres), centres, [std] * len(centres))


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_autoguidance_follows_the_score_of_p_to_the_w_over_q_to_the_w_less_one(scale):
    """Tweedie: x_0_hat = (x_t + sigma^2 score) / alpha, the score by autograd of the densities, not of denoisers."""
    data, guide = mixture(0.5), mixture(0.9)
    generator = torch.Generator().manual_seed(0)
    level = ld.ContinuousCosineSchedule()(
        torch.rand(64, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    )
    noise = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    x_t = level.diffuse(data.sample(64, generator), noise).requires_grad_()
    log_density = scale * data.log_prob(x_t, level) - (scale - 1) * guide.log_prob(x_t, level)
    (score,) = torch.autograd.grad(log_density.sum(), x_t)
    expected = (x_t + per_sample(level.sigma**2, x_t) * score) / per_sample(level.alpha, x_t)
    guided = ld.AutoGuidance("", scale)(data.denoise, guide.denoise)
    assert_close(guided(x_t.detach(), level), expected.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [1.5, 3.0])
@pytest.mark.parametrize("centres", [[[0.0, 0.0]], CENTRES], ids=["one", "three"])
def test_autoguidance_sharpens_each_mode_as_the_ode_says(scale, centres):
    """dx/dsigma = sigma x (w/(s^2 + sigma^2) - (w-1)/(q^2 + sigma^2)) within a mode: its deviation s becomes
    s (s/q)^(w-1), for modes s that the guide sees as broad as q."""
    s, q = 0.2, 0.3
    data, guide = mixture(s, centres), mixture(q, centres)
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    guided = ld.AutoGuidance("", scale)(data.denoise, guide.denoise)
    drawn = ld.Heun(60)(guided, noise, ld.EDMSchedule(sigma_min=1e-3, sigma_max=200.0))
    near = torch.tensor(centres, dtype=torch.float64)
    offsets = drawn - near[torch.cdist(drawn, near).argmin(1)]
    deviation = offsets.square().mean().sqrt().item()
    error = deviation / math.sqrt(2 * offsets.numel())
    assert abs(deviation - s * (s / q) ** (scale - 1)) < 4 * error + 2e-3 * deviation


class Scaled(ld.Network):
    """Exact under EDM preconditioning for Gaussian data of deviation sigma_data, but for a factor on the residual."""

    def __init__(self, factor=0.0, shape=(1, 4, 4), num_classes=3):
        super().__init__()
        self.image_shape, self.num_classes = shape, num_classes
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x, c_noise, label=None):
        return self.factor * x + (
            0 if label is None or not self.num_classes else 0.01 * label[:, None, None, None]
        )


def model(factor=0.0, schedule=None, **arguments):
    parts = (schedule or ld.EDMSchedule(), ld.LogNormalSigma(), ld.EDMPreconditioning(), ld.EDMWeighting())
    return ld.DiffusionModule(Scaled(factor, **arguments), ld.DiffusionObjective(*parts), ld.Identity(False))


@pytest.mark.parametrize("schedule", [ld.EDMSchedule(), ld.FlowSchedule(), ld.LinearSchedule()])
def test_a_guide_may_have_been_trained_on_another_process(schedule):
    """c_in x_t does not depend on the scaling: equal networks are equal denoisers, with nothing to move away from."""
    label = {"label": torch.tensor([0, 1, 2, 3])}
    own, guide = model(0.1), model(0.1, schedule)
    level = ld.EDMSchedule().at(torch.tensor([-8.0, -2.0, 0.0, 6.0]))
    x_t = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    guided = own.denoiser(label, ld.AutoGuidance(guide, 3.0))(x_t, level)
    assert_close(guided, own.denoiser(label)(x_t, level), rtol=1e-4, atol=1e-4)
    other = own.denoiser(label, ld.AutoGuidance(model(0.5, schedule), 3.0))(x_t, level)
    far = model(0.5).denoiser(label)(x_t, level)
    assert_close(other, 3 * own.denoiser(label)(x_t, level) - 2 * far, rtol=1e-4, atol=1e-4)


def test_pure_noise_is_no_level_of_a_guide_without_end():
    own = model(schedule=ld.FlowSchedule())
    level = NoiseLevel(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="pure noise, which the guide's EDMSchedule never reaches"):
        own.denoiser(None, ld.AutoGuidance(model()))(torch.zeros(2, 1, 4, 4), level)
    bounded = own.denoiser(None, ld.AutoGuidance(model(), interval=(0.0, 50.0)))
    assert bounded(torch.ones(2, 1, 4, 4), level).isfinite().all()


def test_a_guide_without_classes_is_classifier_free_guidance_between_two_networks():
    """Its label is not told: it answers as the model would without one."""
    own, label = model(0.1), {"label": torch.tensor([1, 2])}
    level, x_t = NoiseLevel(torch.ones(2), torch.ones(2)), torch.ones(2, 1, 4, 4)
    between = own.denoiser(label, ld.AutoGuidance(model(0.1, num_classes=0), 2.0))(x_t, level)
    assert_close(between, own.denoiser(label, ld.ClassifierFree(2.0))(x_t, level))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (lambda: model(shape=(1, 8, 8)), r"images of \(1, 8, 8\), the model \(1, 4, 4\)"),
        (lambda: model(num_classes=5), "classes 5, the model 3"),
        (
            lambda: ld.DiffusionModule(Scaled(), representation=ld.Standardize([0.0], [0.3])),
            "Standardize is not the model's Identity",
        ),
    ],
)
def test_guides_of_other_data_are_refused(guide, message):
    with pytest.raises(ValueError, match=message):
        model().denoiser(None, ld.AutoGuidance(guide()))


def test_guidance_without_a_null_label_is_refused():
    for lacking in (model(num_classes=0), ld.DiffusionModule(Scaled(), label_dropout=0.0)):
        with pytest.raises(ValueError, match=r"ClassifierFree\(.*needs a null label.*or use AutoGuidance"):
            lacking.denoiser(None, ld.ClassifierFree(2.0))
    model(num_classes=0).denoiser(None, ld.AutoGuidance(model(num_classes=0)))
