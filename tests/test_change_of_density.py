"""with_density and absorb_weight keep the expected gradient; what cannot be kept is refused where it is built."""

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.analysis.information import GaussianMixture
from lightning_diffusion.recording import spec

WIDE = ld.LogNormalSigma(-0.5, 2.0)
ZERO_SNR = ld.CosineSchedule(50, zero_terminal_snr=True)
OBJECTIVES = {
    "EDM": ld.EDM(),
    "EDM, soft min-SNR": ld.EDM(weighting=ld.SoftMinSNR()),
    "sigmoid on a flow": ld.RectifiedFlow(weighting=ld.Sigmoid(-1.0)),
    "flow": ld.RectifiedFlow(ld.LogitNormalTime()),
    "epsilon on a table": ld.DDPM(),
    "min-SNR on a table": ld.DDPM(weighting=ld.MinSNR()),
    "v on a short table that ends in noise": ld.VPrediction(ZERO_SNR, weighting=ld.P2()),
}


def middles(n):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def bump(log_snr):
    """What a loss might look like over the axis; 1 where there is no data left."""
    return 1 + (2 * log_snr.clamp(min=-50)).sin() * torch.exp(-((log_snr - 1) ** 2) / 9)


def expected(objective, f=bump):
    """E[importance * weight on the residual * f], over all of u."""
    log_snr = objective.density.quantile(middles(200_000), objective.schedule)
    weight = objective._weight_on_residual(log_snr)
    importance = objective.density.importance(log_snr, objective.schedule)
    return (weight * (1 if importance is None else importance) * f(log_snr)).mean()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_absorbing_the_weight_keeps_every_expectation(name):
    absorbed = OBJECTIVES[name].absorb_weight()
    assert isinstance(absorbed.weighting, ld.EDMWeighting)
    assert absorbed.density.importance(torch.zeros(1), absorbed.schedule) is None
    assert_close(expected(absorbed), expected(OBJECTIVES[name]), rtol=1e-3, atol=0)
    table = isinstance(absorbed.schedule, ld.DiscreteSchedule)
    log_snr = absorbed.schedule.log_snrs[:-1] if table else torch.linspace(-8, 8, 90, dtype=torch.float64)
    own, other = (o.effective_weight(log_snr) for o in (absorbed, OBJECTIVES[name]))
    assert_close(own, other, rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "ends in noise" not in name])
def test_drawing_elsewhere_keeps_every_expectation(name):
    """To within the cells of a table, where a density without one is put in its place."""
    moved = OBJECTIVES[name].with_density(WIDE)
    discrete = isinstance(moved.schedule, ld.DiscreteSchedule)
    assert_close(expected(moved), expected(OBJECTIVES[name]), rtol=0.01 if discrete else 1e-3, atol=0)
    log_snr = torch.linspace(-8, 8, 50, dtype=torch.float64)
    assert torch.equal(moved.effective_weight(log_snr), OBJECTIVES[name].effective_weight(log_snr))


def test_a_changed_density_can_be_changed_again():
    once = ld.EDM().with_density(WIDE)
    again = once.with_density(ld.LogUniformSigma())
    adaptive = ld.EDM(density=ld.AdaptiveDensity()).with_density(WIDE)
    assert again.density == ld.Importance(ld.LogUniformSigma(), ld.LogNormalSigma())
    assert once.density == adaptive.density
    assert_close(expected(again), expected(ld.EDM()), rtol=1e-3, atol=0)


def test_changed_objectives_keep_their_other_parts_and_can_be_recorded():
    trained = ld.EDM(0.7, ld.LogNormalSigma(-0.9), ld.MinSNR(), stable_target=ld.StableTarget(extra=2))
    for changed in (trained.with_density(WIDE), trained.absorb_weight()):
        again = json.loads(json.dumps(spec(changed)))["init_args"]
        assert again["preconditioning"] == spec(trained.preconditioning)
        assert again["stable_target"] == spec(trained.stable_target)
    learned = ld.EDM2()
    nn.init.normal_(learned.weighting.weight)
    assert torch.equal(learned.with_density(WIDE).weighting.weight, learned.weighting.weight)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(3, 24), nn.SiLU(), nn.Linear(24, 2))

    def forward(self, x, c_noise):
        return self.body(torch.cat([x, c_noise[:, None] / c_noise.abs().max().clamp(min=1)], 1))


MIXTURE = GaussianMixture([0.3, 0.7], [[-0.5, 0.2], [0.4, -0.3]], [0.2, 0.1])


def gradients(objective, batches=150):
    """Of an untrained network, projected on four directions: (batches, 4)."""
    network, generator = MLP(), torch.Generator().manual_seed(11)
    size = sum(p.numel() for p in network.parameters())
    directions = torch.randn(size, 4, generator=generator) / size**0.5
    rows = []
    for batch in range(batches):
        x0 = MIXTURE.sample(256, generator).float()
        loss = objective.loss(network, x0, key=ld.RandomKey(1, 0, batch)).loss
        grads = torch.autograd.grad(loss, list(network.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]) @ directions)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("trained", "density"),
    [
        (ld.EDM(), WIDE),
        (ld.EDM(weighting=ld.MinSNR()), ld.LogUniformSigma()),
        (ld.EDM2(), WIDE),
        (ld.RectifiedFlow(ld.LogitNormalTime()), ld.LogitNormalTime(0.0, 1.6)),
    ],
    ids=["EDM", "min-SNR", "learned", "flow"],
)
def test_gradients_agree_where_the_network_is_no_optimum(trained, density):
    plain = gradients(trained)
    for changed in (
        trained.with_density(density),
        None if isinstance(trained, ld.EDM2) else trained.absorb_weight(),
        trained._changed(density=ld.AdaptiveDensity(trained.density, half_life=2000.0)),
    ):
        if changed is not None:
            other = gradients(changed)
            error = (plain.var(0) / len(plain) + other.var(0) / len(other)).sqrt()
            assert ((plain.mean(0) - other.mean(0)).abs() < 3 * error).all()
            assert (plain.mean(0).abs() > 5 * error).any()


def test_tabulated_quantiles_invert_the_integral_of_log_prob():
    """Steep, flat, falling and rising pieces, against the trapezoid rule."""
    density = ld.TabulatedDensity((-8.0, -2.0, -1.0, 0.0, 5.0), (-60.0, 0.0, 0.0, 1.0, -30.0))
    log_snr = torch.linspace(-8, 5, 400_001, dtype=torch.float64)
    p = density.log_prob(log_snr, ld.EDMSchedule()).exp()
    above = 1 - torch.cumulative_trapezoid(p, log_snr)
    inner = (above > 1e-6) & (above < 1 - 1e-6)
    found = density.quantile(above[inner], ld.EDMSchedule())
    assert_close(found, log_snr[1:][inner], rtol=0, atol=2e-4)
    assert density.log_prob(torch.tensor([-8.1, 5.1]), ld.EDMSchedule()).tolist() == [-torch.inf] * 2


def test_tabulated_time_gives_entries_their_shares():
    schedule, shares = ld.LinearSchedule(5, 0.1, 0.5), (1.0, 0.0, 3.0, 4.0, 2.0)
    drawn = ld.TabulatedTime(shares).quantile(middles(1000), schedule)
    counts = [(drawn == entry).sum().item() for entry in schedule.log_snrs]
    assert counts == [100, 0, 300, 400, 200]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ld.EDM(density=ld.LogUniformSigma(1e-5, 1e-4)),
            r"draws log-SNRs from 18.* to 23, but EDMSchedule.* goes from -8.76 to 12.4: no level",
        ),
        (
            lambda: ld.EDM(density=ld.Truncated(ld.LogNormalSigma(std=9.0), 20.0, 30.0)),
            "Move the density, or the schedule's range",
        ),
        (
            lambda: ld.EDM(density=ld.Truncated(ld.LogNormalSigma(), 40.0, 50.0)),
            "no mass between log-SNR 40.0",
        ),
        (lambda: ld.EDM(density=ld.AdaptiveDensity(ld.UniformSigma(200.0, 300.0))), "no level"),
        (
            lambda: ld.EDM().with_density(ld.LogUniformSigma(0.1, 1.0)),
            r"LogUniformSigma.* misses 33.8% of LogNormalSigma.*those levels would not be trained",
        ),
        (
            lambda: ld.VPrediction(ZERO_SNR).with_density(WIDE),
            r"misses 2.0% of UniformTime.*between log-SNR -inf and -inf",
        ),
        (lambda: ld.EDM().with_density(ld.AdaptiveDensity()), "write the intended density itself"),
        (lambda: ld.EDM2().absorb_weight(), "Uncertainty changes while it is trained"),
        (lambda: ld.EDMWeighting(scale=0.0), "expected scale > 0"),
        (lambda: ld.TabulatedDensity((0.0, 1.0), (0.0,)), "Found 2 knots and 1 heights"),
        (lambda: ld.TabulatedDensity((0.0, 0.0), (0.0, 1.0)), "do not rise"),
        (lambda: ld.TabulatedDensity((0.0, 1.0), (0.0, -torch.inf)), "not finite"),
        (lambda: ld.TabulatedTime(()), "expected shares of at least 0"),
        (lambda: ld.TabulatedTime((1.0, -1.0, 3.0)), "Found shares below zero"),
    ],
)
def test_what_cannot_be_kept_is_refused_where_it_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()
