"""The effective weight: closed forms of the papers, losses by level, and who trains the same thing as whom."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from cases import SCHEDULES, TARGETS
from torch import nn
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.targets import Space

LAMBDA = torch.linspace(-9, 9, 181, dtype=torch.float64)
SNR = LAMBDA.exp()
S = LAMBDA.sigmoid()  # carries a weight on epsilon to the residual, data of deviation 1
SECH = 1 / (2 * math.pi * (LAMBDA / 2).cosh())
EDM_TO_ALL = [ld.EDMPreconditioning(target, 1.0) for target in TARGETS]


def normal(mean, std):
    return (-(((LAMBDA - mean) / std) ** 2) / 2).exp() / (std * math.sqrt(2 * math.pi))


def objective(schedule, density, preconditioning, weighting=ld.EDMWeighting()):
    return ld.DiffusionObjective(schedule, density, preconditioning, weighting)


def plain(target, weighting=ld.Constant(), schedule=ld.LinearSchedule(), density=ld.UniformTime()):
    """Predicts the target itself on data of deviation 1."""
    return objective(schedule, density, ld.DDPMPreconditioning(target), weighting)


def unit(
    sigma_data=1.0, schedule=ld.EDMSchedule(), density=ld.LogNormalSigma(-0.5, 1.2), weight=ld.EDMWeighting()
):
    return objective(schedule, density, ld.EDMPreconditioning(sigma_data=sigma_data), weight)


def linear_density():
    """Uniform t on the linear table, in the limit of the VP-SDE: (1 - abar) / (T beta), at LAMBDA."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    at = torch.searchsorted(-(abar / (1 - abar)).log(), -LAMBDA).clamp(max=999)
    return ((1 - abar) / (1000 * betas))[at]


COSINE, FLOW = ld.ContinuousCosineSchedule(), ld.FlowSchedule()
WIDE, NARROW = ld.LogUniformSigma(0.002, 200.0), ld.LogNormalSigma(0.0, 1.5)
SAME = {
    "v on a cosine, velocity on a flow, cosmap": (
        SECH,
        [
            plain(ld.V(), schedule=COSINE),
            plain(ld.Flow(), schedule=FLOW),
            unit(schedule=COSINE, density=ld.UniformTime()),
            unit(schedule=FLOW, density=ld.CosMapTime()),
        ],
    ),
    "log-normal sigma, logit-normal t on a flow (EDM)": (
        normal(1.0, 2.4),
        [unit(), unit(schedule=FLOW, density=ld.LogitNormalTime(-0.5, 1.2))],
    ),
    "EDM with every target": (
        normal(1.0, 2.4),
        [objective(ld.EDMSchedule(), ld.LogNormalSigma(-0.5, 1.2), p) for p in EDM_TO_ALL],
    ),
    "sampled by importance or where gradients are large": (
        normal(1.0, 2.4),
        [
            unit(density=ld.Importance(WIDE, ld.LogNormalSigma(-0.5, 1.2))),
            unit(density=ld.AdaptiveDensity(ld.LogNormalSigma(-0.5, 1.2))),
        ],
    ),
    "epsilon, and x_0 times SNR (DDPM)": (
        linear_density() * S,
        [plain(ld.Epsilon()), plain(ld.X0(), ld.SNRPower()), plain(ld.V(), ld.SNRPower())],
    ),
    "min-SNR on x_0, epsilon and v": (
        linear_density() * S * (5 / SNR).clamp(max=1),
        [plain(target, ld.MinSNR()) for target in (ld.X0(), ld.Epsilon(), ld.V())],
    ),
    "v, and x_0 times SNR + 1": (
        linear_density(),
        [plain(ld.V()), plain(ld.X0(), ld.EDMWeighting()), plain(ld.Epsilon(), ld.EDMWeighting())],
    ),
    "P2 with gamma = 1, and soft min-SNR with gamma = 1": (
        linear_density() * S / (1 + SNR),
        [plain(ld.Epsilon(), ld.P2()), plain(ld.X0(), ld.SoftMinSNR()), plain(ld.V(), ld.P2())],
    ),
    "the sigmoid under four densities and three processes": (
        S * (-1 - LAMBDA).sigmoid(),
        [
            unit(schedule=schedule, density=density, weight=ld.Sigmoid(-1.0))
            for schedule, density in ((ld.EDMSchedule(), WIDE), (ld.EDMSchedule(), NARROW))
        ]
        + [plain(ld.Epsilon(), ld.Sigmoid(-1.0)), plain(ld.Flow(), ld.Sigmoid(-1.0), FLOW)],
    ),
    "the ELBO, drawn in two ways": (
        S / 2,
        [
            unit(density=WIDE, weight=ld.SNRPower()),
            unit(density=ld.UniformTime(ld.GeometricSchedule(0.002, 200.0)), weight=ld.SNRPower()),
        ],
    ),
    "a flow shifted by 3, and its density moved by 2 ln 3": (
        (LAMBDA / 2 + math.log(3)).sigmoid() * (-LAMBDA / 2 - math.log(3)).sigmoid() / 2,
        [
            unit(schedule=ld.FlowSchedule(3.0), density=ld.UniformTime()),
            unit(density=ld.UniformTime(ld.FlowSchedule(3.0))),
        ],
    ),
}


def shape(curve):
    """Scaled to integral 1 over LAMBDA: only the shape of a curve matters."""
    return curve / torch.trapezoid(curve, LAMBDA)


def distance(one, other):
    """Half the integral of |a - b|: the share of training that falls elsewhere."""
    return torch.trapezoid((shape(one) - shape(other)).abs(), LAMBDA).item() / 2


@pytest.mark.parametrize("name", SAME)
def test_objectives_that_train_the_same_thing_have_the_paper_s_curve(name):
    """Exactly where the curve is continuous, to the width of its cells (1 %) on a table."""
    expected, objectives = SAME[name]
    for same in objectives:
        found = same.effective_weight(LAMBDA)
        discrete = isinstance(same.schedule, ld.DiscreteSchedule) and not isinstance(
            same.weighting, ld.Sigmoid
        )
        if discrete:
            assert distance(found, expected) < 0.01
        else:
            assert_close(shape(found), shape(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sigma_data", [0.25, 3.0])
@pytest.mark.parametrize(
    "weighting", [ld.EDMWeighting(), ld.MinSNR(), ld.P2(), ld.SoftMinSNR(), ld.Sigmoid(1.0)], ids=repr
)
def test_scaling_the_data_moves_the_curve_by_2_log_sigma_data(sigma_data, weighting):
    shift = math.log(sigma_data)
    scaled = unit(sigma_data, density=ld.LogNormalSigma(-0.5 + shift, 1.2), weight=weighting)
    found = scaled.effective_weight(LAMBDA - 2 * shift)
    assert_close(shape(found), shape(unit(weight=weighting).effective_weight(LAMBDA)))


@dataclass(frozen=True)
class OnTarget(ld.Weighting):
    """A function of SNR on whatever is predicted, as some trainers write it."""

    of: object
    space = Space.TARGET

    def __call__(self, level, setting):
        return self.of(level.snr)


TRAINERS_DEBIASED = OnTarget(lambda snr: 1 / (snr.clamp(max=1e3) + 1).sqrt())
TRAINERS_P2 = OnTarget(lambda snr: 1 / (2 + snr))
MISTAKEN_MIN_SNR = OnTarget(lambda snr: snr.clamp(max=5))
SIGMOID_PER_SAMPLE = OnTarget(lambda snr: (-1 - snr.log()).sigmoid())
DIFFERENT = {
    "trainers' debiased weight on v": (plain(ld.V(), TRAINERS_DEBIASED), plain(ld.V(), ld.Debiased())),
    "trainers' P2 weight on v": (plain(ld.V(), TRAINERS_P2), plain(ld.V(), ld.P2())),
    "trainers' P2 weight on epsilon": (plain(ld.Epsilon(), TRAINERS_P2), plain(ld.Epsilon(), ld.P2())),
    "the x_0 weight of min-SNR on epsilon": (
        plain(ld.Epsilon(), MISTAKEN_MIN_SNR),
        plain(ld.Epsilon(), ld.MinSNR()),
    ),
    "the sigmoid per sample": (
        plain(ld.Epsilon(), SIGMOID_PER_SAMPLE),
        plain(ld.Epsilon(), ld.Sigmoid(-1.0)),
    ),
    "epsilon and v": (plain(ld.Epsilon()), plain(ld.V())),
    "a flow shifted, its weight not": (
        plain(ld.Flow(), schedule=ld.FlowSchedule(3.0)),
        unit(density=ld.UniformTime(ld.FlowSchedule(3.0))),
    ),
    "EDM and EDM for the deviation of other data": (unit(1.0), unit(0.5, weight=ld.MinSNR())),
    "linear and cosine tables": (plain(ld.V()), plain(ld.V(), schedule=ld.CosineSchedule())),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_objectives_that_only_look_alike_differ_by_more_than_5_percent(name):
    one, other = (o.effective_weight(LAMBDA) for o in DIFFERENT[name])
    assert distance(one, other) > 0.05


class AtLevel(nn.Module):
    """Puts out nothing on the residual: E[R^2] = 1 for Gaussian data, whatever the network has to predict."""

    def __init__(self, preconditioning):
        super().__init__()
        self.full = ld.EDMPreconditioning(preconditioning.target, preconditioning.sigma_data)
        self.plain = isinstance(preconditioning, ld.DDPMPreconditioning)
        self.level = None

    def forward(self, x, c_noise):
        return self.full(self.level).c_skip[:, None] * x if self.plain else torch.zeros_like(x)


@pytest.mark.parametrize(
    "trained",
    [
        ld.EDM(),
        ld.EDM(weighting=ld.MinSNR()),
        ld.EDM(density=ld.Importance(WIDE, ld.LogNormalSigma(-1.0, 1.0))),
        ld.DDPM(),
        ld.DDPM(weighting=ld.P2(), target=ld.V()),
        ld.VPrediction(weighting=ld.Sigmoid()),
        ld.RectifiedFlow(),
        ld.RectifiedFlow(ld.LogitNormalTime(), ld.Debiased(), ld.FlowSchedule(2.0)),
    ],
    ids=[f"{i}" for i in range(8)],
)
def test_it_is_the_loss_of_an_idle_network_by_level(trained):
    """A histogram of what 200,000 samples add to the loss, against the curve's integral over each bin; 4 errors."""
    n, dims = 200_000, 2
    network = AtLevel(trained.preconditioning)
    generator = torch.Generator().manual_seed(2)
    x0 = trained.sigma_data * torch.randn(n, dims, generator=generator, dtype=torch.float64)
    network.level, noise = trained.draw(x0, ld.RandomKey(5))
    report = trained.loss_at(network, x0, noise, network.level)
    weight = trained.density.importance(report.level.log_snr, trained.schedule)
    added = report.per_sample.detach() * (1 if weight is None else weight)
    edges = torch.linspace(-6, 8, 15, dtype=torch.float64)
    for low, high in itertools.pairwise(edges):
        part = added * ((report.level.log_snr > low) & (report.level.log_snr <= high))
        at = torch.linspace(low, high, 2001, dtype=torch.float64)
        expected = torch.trapezoid(trained.effective_weight(at), at)
        table = (
            expected / 10 if isinstance(trained.schedule, ld.DiscreteSchedule) else 0.0
        )  # an entry more or less
        assert (part.mean() - expected).abs() < 4 * part.std() / n**0.5 + 1e-6 + table


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_normalised_curves_have_integral_1(schedule):
    log_snr = torch.linspace(-50, 50, 200_001, dtype=torch.float64)
    for density in (ld.UniformTime(), ld.LogNormalSigma(), ld.LogitNormalTime()):
        trained = unit(1.0, schedule, density, ld.MinSNR())
        omega = trained.effective_weight(log_snr, normalize=True)
        assert torch.trapezoid(omega, log_snr).item() == pytest.approx(1, abs=2e-3)


def test_a_learned_weight_is_seen_as_it_stands():
    """Half the gradient of the minimised loss by a squared error of 1, by automatic differentiation."""
    trained = ld.EDM2()
    log_snr = LAMBDA.float()
    level = trained.schedule.at(log_snr)
    loss = torch.ones_like(log_snr, requires_grad=True)
    trained.weighting.combine(loss, trained.preconditioning.c_noise(level)).sum().backward()
    expected = loss.grad * trained.density.log_prob(log_snr, trained.schedule).exp()
    assert_close(trained.effective_weight(log_snr), expected)


def test_it_is_finite_at_both_ends_for_every_schedule():
    for schedule in SCHEDULES:
        low = -math.inf if schedule.reaches_zero_snr else -80.0
        ends = torch.tensor([low, -80.0, 80.0, math.inf], dtype=torch.float64)
        assert unit(0.5, schedule, ld.LogNormalSigma(), ld.Constant()).effective_weight(ends).isfinite().all()
