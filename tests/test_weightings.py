"""Weightings against the printed formulas, in two spaces each, and what none may do."""

import pytest
import torch
from cases import TARGETS, WEIGHTINGS
from torch import nn
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion import NoiseLevel

SNR = torch.logspace(-6, 6, 49, dtype=torch.float64)
LEVEL = NoiseLevel((SNR / (1 + SNR)).sqrt(), (1 / (1 + SNR)).sqrt())

ON_DATA = {
    ld.SNRPower(): SNR,
    ld.SNRPower(gamma=0.5): SNR**0.5,
    ld.MinSNR(): SNR.clamp(max=5),
    ld.MaxSNR(): SNR.clamp(min=1),
    ld.SNRClip(): SNR.clamp(1, 5),
    ld.LogSNR(): (1 + SNR).log(),
    ld.SoftMinSNR(): 1 / (1 / SNR + 1),
    ld.EDMWeighting(): SNR + 1,
}
ON_NOISE = {
    ld.P2(): 1 / (1 + SNR),
    ld.P2(gamma=0.5): (1 + SNR) ** -0.5,
    ld.MinSNR(): (5 / SNR).clamp(max=1),
    ld.MaxSNR(): (1 / SNR).clamp(min=1),
    ld.SNRPower(): torch.ones_like(SNR),
    ld.SoftMinSNR(): 1 / (1 + SNR),
    ld.Debiased(): SNR.clamp(max=1000) ** -0.5,
    ld.EDMWeighting(): 1 + 1 / SNR,
}
ON_V = {
    ld.MinSNR(): SNR.clamp(max=5) / (SNR + 1),
    ld.Debiased(): SNR.clamp(max=1000) ** 0.5 / (SNR + 1) * (SNR / SNR.clamp(max=1000)),
}


def weight(weighting, target, level=LEVEL):
    """On the plain squared error of the target, for data of deviation 1."""
    preconditioning = ld.DDPMPreconditioning(target)
    return ld.DiffusionObjective(ld.LinearSchedule(), ld.UniformTime(), preconditioning, weighting).weight(
        level
    )


@pytest.mark.parametrize(
    ("target", "weighting", "printed"),
    [
        (target, weighting, printed)
        for target, table in ((ld.X0(), ON_DATA), (ld.Epsilon(), ON_NOISE), (ld.V(), ON_V))
        for weighting, printed in table.items()
    ],
)
def test_weights_are_the_printed_ones(target, weighting, printed):
    assert_close(weight(weighting, target), printed, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda w: type(w).__name__)
def test_a_weight_counts_the_same_error_alike_for_every_target(weighting):
    """|y error|^2 = (D / sigma)^2 |x_0 error|^2: weight times D^2 is the same, but for weights on the target itself."""
    if weighting.space.name == "TARGET":
        pytest.skip("means another thing for every target, as it says")
    on_data = weight(weighting, ld.X0()) * LEVEL.sigma**2
    for target in TARGETS:
        assert_close(weight(weighting, target) * target.determinant(LEVEL) ** 2, on_data, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda w: type(w).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_finite_and_not_negative_from_pure_noise_to_clean_data(weighting, dtype):
    objective = ld.DiffusionObjective(
        ld.ContinuousCosineSchedule(), ld.UniformTime(), ld.EDMPreconditioning(ld.V(), 0.7), weighting
    )
    level = NoiseLevel(
        torch.tensor([0, 1e-12, 0.3, 1, 1, 1], dtype=dtype),
        torch.tensor([1, 1, 0.95, 1e-3, 1e-12, 0], dtype=dtype),
    )
    found = objective.weight(level)
    assert found.isfinite().all()
    assert (found >= 0).all()


@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if isinstance(w, ld.SNRWeighting)], ids=repr)
def test_scaling_the_data_changes_nothing(weighting):
    """Data three times as large, noise three times as large: the same weight on the unit-variance residual."""

    def on_residual(sigma_data, level):
        preconditioning = ld.EDMPreconditioning(sigma_data=sigma_data)
        return ld.DiffusionObjective(
            ld.EDMSchedule(), ld.LogNormalSigma(), preconditioning, weighting
        ).weight(level)

    small = NoiseLevel(torch.ones(9).double(), torch.logspace(-2, 2, 9).double())
    large = NoiseLevel(small.alpha, 3 * small.sigma)
    assert_close(on_residual(3.0, large), on_residual(1.0, small))


def test_sigmoid_weight_does_not_depend_on_where_training_draws():
    """Weight times density is sigmoid(bias - log_snr) on epsilon, whatever the density."""
    for density in (ld.UniformTime(), ld.LogitNormalTime(), ld.LogNormalSigma(0.0, 1.0)):
        objective = ld.DiffusionObjective(
            ld.FlowSchedule(), density, ld.EDMPreconditioning(ld.Epsilon(), 1.0), ld.Sigmoid(-1.0)
        )
        log_snr = torch.linspace(-6, 6, 25, dtype=torch.float64)
        level = objective.schedule.at(log_snr)
        on_noise = (
            objective.weight(level)
            * (
                objective.preconditioning.determinant(objective.preconditioning.output_space, level)
                / level.alpha
            )
            ** 2
        )
        product = on_noise * density.log_prob(log_snr, objective.schedule).exp()
        assert_close(product, (-1 - log_snr).sigmoid())


class Constant(nn.Module):
    def forward(self, x, c_noise):
        return torch.zeros_like(x)


def test_uncertainty_learns_the_log_of_the_loss_at_each_level():
    """A network that is off by known amounts: u tends to ln E[loss], and the gradient is shared equally."""
    torch.manual_seed(0)
    uncertainty = ld.Uncertainty(32)
    objective = ld.DiffusionObjective(
        ld.EDMSchedule(), ld.LogNormalSigma(), ld.EDMPreconditioning(), uncertainty
    )
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    c_noise = torch.linspace(-1, 1, 64)
    loss = (0.3 * c_noise).exp()
    for _ in range(1500):
        optimizer.zero_grad()
        objective.weighting.combine(loss, c_noise).mean().backward()
        optimizer.step()
    before = (uncertainty.log_loss(c_noise) - 0.3 * c_noise).abs().mean()
    after = (objective.weighting.log_loss(c_noise) - 0.3 * c_noise).abs().mean()
    assert after < 0.3 * before


def test_uncertainty_does_not_slow_down_as_its_weights_grow():
    """Steps are perpendicular to the weights and would lengthen them; before each they are put back."""
    uncertainty = ld.Uncertainty(32)
    optimizer = torch.optim.SGD(uncertainty.parameters(), lr=30.0)
    c_noise, grown = torch.linspace(-1, 1, 64), []
    loss = c_noise.exp()
    for _ in range(20):
        optimizer.zero_grad()
        uncertainty.combine(loss, c_noise).mean().backward()
        assert uncertainty.weight.square().mean().item() == pytest.approx(1, rel=1e-3)
        optimizer.step()
        grown.append(uncertainty.weight.square().mean().item())
    assert max(grown) > 1.01
    before = uncertainty.weight.detach().clone()
    uncertainty.eval().combine(loss, c_noise)
    with torch.no_grad():
        uncertainty.train().combine(loss, c_noise)
    assert torch.equal(uncertainty.weight, before)


def test_uncertainty_starts_with_unit_deviation_and_is_saved_with_the_objective():
    u = ld.Uncertainty().log_loss(torch.linspace(-2000, 2000, 100_000))
    assert u.std().item() == pytest.approx(1, rel=0.1)
    objective = ld.DiffusionObjective(
        ld.EDMSchedule(), ld.LogNormalSigma(), ld.EDMPreconditioning(), ld.Uncertainty()
    )
    assert torch.equal(objective.weighting.log_loss(u), ld.Uncertainty().log_loss(u))  # on every rank
    assert {"weighting.weight", "weighting.frequencies", "weighting.phases"} == set(objective.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ld.P2(gamma=-1.0), "at least 0"),
        (lambda: ld.MinSNR(-5.0), "at least 0"),
        (lambda: ld.SNRClip(3.0, 2.0), "rising order"),
        (lambda: ld.SoftMinSNR(0.0), "gamma > 0"),
        (lambda: ld.Debiased(0.0), "limit > 0"),
    ],
)
def test_negative_weights_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
