"""AdaptiveDensity: finds the optimum, changes no expectation, starves no level, resumes and agrees over processes."""

import itertools

import lightning as L
import pytest
import torch
from foreign import QUIET
from small_module import module
from sync_counter import SyncCounter
from torch import nn
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.datamodules import DigitsDataModule

EDM = ld.EDMSchedule()
CASES = [
    (ld.LogNormalSigma(), EDM, 64),
    (ld.UniformTime(), ld.FlowSchedule(), 16),
    (ld.UniformTime(), ld.LinearSchedule(), 64),
    (ld.UniformTime(), ld.LinearSchedule(50, 2e-3, 0.3), 64),
    (ld.UniformTime(), ld.CosineSchedule(zero_terminal_snr=True), 7),
    (ld.Truncated(ld.LogNormalSigma(), -4.0, 6.0), EDM, 32),
]


def gradient(log_snr):
    """A squared gradient that varies over the axis by a factor of 400."""
    return 0.05 + 20 * torch.exp(-((log_snr - 2) ** 2) / 4)


def middles(n):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def learned(density, schedule, steps=40, batch=512, world_size=1, rank=0, of=gradient):
    for step in range(steps):
        key = ld.RandomKey(1, step // 10, step % 10, rank=rank, world_size=world_size)
        log_snr = density.draw(batch // world_size, schedule, key).float()
        density.observe(log_snr, of(log_snr), schedule, key)
    return density


@pytest.mark.parametrize(("intended", "schedule", "bins"), CASES, ids=repr)
def test_importance_makes_up_for_where_draws_fall(intended, schedule, bins):
    """Means over all of u, of functions that see the middle, an end and the share of pure noise."""
    density = learned(ld.AdaptiveDensity(intended, bins=bins), schedule)
    assert density.multiplier.max() > 1.3
    u = middles(200_000)
    plain, drawn = intended.quantile(u, schedule), density.quantile(u, schedule)
    weight = density.importance(drawn, schedule)
    assert weight.mean().item() == pytest.approx(1, abs=1e-4)
    for f in (torch.sigmoid, lambda x: (x > 3).double(), lambda x: (x < -300).double()):
        assert (weight * f(drawn)).mean().item() == pytest.approx(f(plain).mean().item(), abs=1e-4)


@pytest.mark.parametrize(("intended", "schedule"), [(c[0], c[1]) for c in CASES[:4]], ids=repr)
def test_it_finds_the_density_of_least_variance(intended, schedule):
    """q ~ p sqrt(E[g^2]) in the limit of no floor: E_q[(p / q)^2 g^2] reaches (E_p sqrt(E[g^2]))^2, its least value."""
    density = learned(ld.AdaptiveDensity(intended, floor=1e-3, bins=50), schedule, steps=100)
    u = middles(50_000)
    plain, drawn = intended.quantile(u, schedule), density.quantile(u, schedule)
    found = (density.importance(drawn, schedule) ** 2 * gradient(drawn)).mean()
    least, before = gradient(plain).sqrt().mean() ** 2, gradient(plain).mean()
    assert found < least + 0.05 * (before - least)


def test_draws_fall_as_the_multiplier_says():
    density = learned(ld.AdaptiveDensity(bins=8, floor=0.2), EDM)
    n = 80_000
    stratum = (ld.LogNormalSigma().share_above(density.quantile(middles(n), EDM), EDM) * 8).long()
    assert_close(stratum.bincount(minlength=8) / n * 8, density.multiplier, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "of",
    [
        lambda x: torch.full_like(x, torch.nan),
        lambda x: torch.where(x > 0, torch.inf, 1.0),
        torch.zeros_like,
        lambda x: 1e30 * (x > 4).float(),
    ],
    ids=["nan", "infinite", "zero", "one level only"],
)
def test_no_level_starves(of):
    density = learned(ld.AdaptiveDensity(floor=0.2, half_life=1000.0), EDM, of=of)
    assert (density.multiplier >= 0.2).all()
    assert density.multiplier.mean().item() == pytest.approx(1, abs=1e-5)
    assert density.importance(density.quantile(middles(1000), EDM), EDM).max() <= 5 + 1e-6


def test_observations_fade():
    density = learned(ld.AdaptiveDensity(half_life=1000.0), EDM)
    faded = learned(density, EDM, of=torch.ones_like)
    assert (faded.multiplier - 1).abs().max() < 0.05


def test_evaluation_draws_what_is_intended_and_teaches_nothing():
    objective = ld.EDM(density=ld.AdaptiveDensity())
    learned(objective.density, EDM)
    before = {name: x.clone() for name, x in objective.state_dict().items()}
    network, x0, key = nn.Linear(2, 2), torch.randn(8, 2), ld.RandomKey(7, 3, 3)
    network.forward = lambda x, c_noise: x
    objective.eval()
    plain = ld.EDM().loss(network, x0, key=key)
    assert torch.equal(objective.loss(network, x0, key=key).loss, plain.loss)
    objective.train()
    with torch.no_grad():
        assert not torch.equal(objective.loss(network, x0, key=key).loss, plain.loss)
    assert all(torch.equal(x, before[name]) for name, x in objective.state_dict().items())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, c_noise):
        return self.value * x


@pytest.mark.parametrize("weighting", [ld.EDMWeighting(), ld.MinSNR(), ld.Uncertainty()], ids=str)
@pytest.mark.parametrize(
    "density",
    [ld.Importance(ld.LogNormalSigma(-1.0, 1.5), ld.LogNormalSigma()), ld.AdaptiveDensity()],
    ids=["Importance", "Adaptive"],
)
def test_expected_loss_and_gradient_stay_under_every_kind_of_weight(density, weighting):
    """A learned weight among them, which would learn the importance away were it inside."""
    own = ld.DiffusionObjective(EDM, density, ld.EDMPreconditioning(), weighting)
    if own.density.learns:
        learned(own.density, EDM)
    plain = ld.DiffusionObjective(EDM, ld.LogNormalSigma(), ld.EDMPreconditioning(), weighting)
    n = 50_000
    pairs = []
    for objective in (own, plain):
        network = Scaled().double()
        level = EDM.at(objective.density.quantile(middles(n), EDM))
        x0 = torch.ones(n, 1, dtype=torch.float64)
        report = objective.loss_at(network, x0, torch.full_like(x0, 0.5), level)
        report.loss.backward()
        pairs.append(torch.stack([report.loss.detach(), network.value.grad]))
    assert_close(*pairs, rtol=2e-3, atol=0)


def test_the_gradient_it_is_told_is_that_with_respect_to_the_output():
    """Against automatic differentiation, the learned weight included, importance excluded."""
    told = {}

    class Listening(ld.AdaptiveDensity):
        def observe(self, log_snr, gradient, schedule, key):
            told.update(log_snr=log_snr, gradient=gradient)

    for weighting, preconditioning in itertools.product(
        (ld.MinSNR(), ld.Uncertainty()), (ld.EDMPreconditioning(), ld.DDPMPreconditioning(ld.V(), 0.5))
    ):
        objective = ld.DiffusionObjective(EDM, Listening(), preconditioning, weighting)
        outputs = []

        class Network(nn.Module):
            def forward(self, x, c_noise, keep=outputs):
                keep.append((0.3 * x).requires_grad_())
                return keep[-1]

        x0 = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        objective.loss(Network(), x0).loss.backward()
        squared = (64 * outputs[0].grad).square().sum(1)
        assert_close(told["gradient"] * 4 / 3, squared, rtol=1e-5, atol=0)


def stepped(density, places, states=None):
    """Draws over micro-batches; a state before, within and after each."""
    drawn = []
    for epoch, batch, accumulate in places:
        key = ld.RandomKey(3, epoch, batch, accumulate)
        log_snr = density.draw(32, EDM, key)
        density.observe(log_snr.float(), gradient(log_snr.float()), EDM, key)
        drawn.append(log_snr)
        if states is not None:
            states.append({name: x.clone() for name, x in density.state_dict().items()})
    return drawn


def test_a_run_resumed_from_any_place_draws_the_same():
    """Saved after any micro-batch; gone on at the start of its window, or of the next where it was the last."""
    places = [(epoch, batch, 3) for epoch in range(2) for batch in range(7)]
    states = []
    straight = ld.AdaptiveDensity(bins=8, half_life=200.0)
    drawn = stepped(straight, places, states)
    assert (straight.multiplier - 1).abs().max() > 0.3
    for done, state in enumerate(states, start=1):
        batch = done % 7
        starts = {done - batch % 3} | ({done - 1 - (done - 1) % 7 % 3} if batch else set())
        for start in starts:
            resumed = ld.AdaptiveDensity(bins=8, half_life=200.0)
            resumed.load_state_dict(state)
            assert all(map(torch.equal, stepped(resumed, places[start:]), drawn[start:])), (done, start)
            assert torch.equal(resumed.seen, straight.seen)


def test_a_resumed_training_ends_bit_identical(tmp_path):
    def fit(steps, resume=None):
        model = module(objective=ld.EDM(density=ld.AdaptiveDensity(bins=8, half_life=100.0)))
        trainer = L.Trainer(
            **QUIET,
            max_steps=steps,
            accumulate_grad_batches=2,
            limit_val_batches=1,
            enable_checkpointing=False,
        )
        trainer.fit(model, datamodule=DigitsDataModule(batch_size=256), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return model.state_dict()

    straight = fit(6)
    fit(3)
    resumed = fit(6, tmp_path / "3.ckpt")
    assert straight["objective.density.seen"].sum() > 0
    assert all(torch.equal(x, resumed[name]) for name, x in straight.items())
    loaded = ld.DiffusionModule.load_from_checkpoint(tmp_path / "6.ckpt")
    assert torch.equal(loaded.objective.density.multiplier, straight["objective.density.multiplier"])


def test_a_step_does_not_wait_for_the_device():
    objective, network, without = ld.EDM(density=ld.AdaptiveDensity()), Scaled(), ld.EDM()
    x0 = torch.randn(16, 2)
    objective.loss(network, x0, key=ld.RandomKey()).loss.backward()
    with SyncCounter() as counter:
        objective.loss(network, x0, key=ld.RandomKey(0, 0, 1)).loss.backward()
    with SyncCounter() as plain:
        without.loss(network, x0, key=ld.RandomKey(0, 0, 1)).loss.backward()
    assert objective.density.seen.sum() > 0
    assert counter.calls == plain.calls == []


def test_statistics_stay_in_float32_beside_a_low_precision_network():
    objective = learned(ld.AdaptiveDensity(), EDM)
    before = objective.seen.clone()
    assert torch.equal(objective.bfloat16().seen, before)
    assert objective.half().to("cpu", torch.float16).multiplier.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ld.AdaptiveDensity(floor=0.0), "floor=0.0.*expected 0 < floor <= 1"),
        (lambda: ld.AdaptiveDensity(bins=0), "at least 1 bin"),
        (lambda: ld.AdaptiveDensity(half_life=0.0), "positive number of samples"),
        (lambda: ld.AdaptiveDensity(ld.AdaptiveDensity()), "write the intended density itself"),
        (lambda: ld.Truncated(ld.AdaptiveDensity()), "Truncated was given .*stand for another density"),
        (lambda: ld.Importance(ld.AdaptiveDensity(), ld.LogNormalSigma()), "write the intended density"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
