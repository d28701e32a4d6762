"""The objective: exact losses for known networks, weights carried between spaces, and what a step may not do."""

import json

import pytest
import torch
from cases import DENSITIES, FAMILIES, PRECONDITIONINGS, PRESETS, SCHEDULES, TARGETS, WEIGHTINGS, refused
from torch import nn
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion import NoiseLevel
from lightning_diffusion.recording import spec


def final_subclasses(cls):
    own = [sub for sub in cls.__subclasses__() if sub.__module__.startswith("lightning_diffusion.")]
    return {cls} if not own else {c for sub in own for c in final_subclasses(sub)}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_member_is_listed(family):
    assert {type(member) for member in FAMILIES[family]} == final_subclasses(family)


class Zero(nn.Module):
    """The exact network for Gaussian data under full preconditioning."""

    def forward(self, x, c_noise):
        return torch.zeros_like(x)


class Scaled(nn.Module):
    """A network with one number to learn."""

    def __init__(self, value=0.3):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x, c_noise):
        return self.value * x


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_gaussian_data_are_denoised_exactly(schedule, sigma_data):
    """E[x_0 | x_t] = alpha sd^2 x_t / V for x_0 ~ N(0, sd^2): the network has nothing to add."""
    objective = ld.DiffusionObjective(
        schedule, ld.UniformTime(), ld.EDMPreconditioning(sigma_data=sigma_data), ld.EDMWeighting()
    )
    level = schedule(torch.linspace(0, 1, 9, dtype=torch.float64))
    x_t = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    gain = level.alpha * sigma_data**2 / (level.alpha**2 * sigma_data**2 + level.sigma**2)
    assert_close(objective.denoise(Zero(), x_t, level), gain[:, None] * x_t)


@pytest.mark.parametrize("preset", [ld.EDM(), ld.EDM(sigma_data=2.0)], ids=["0.5", "2.0"])
def test_zero_network_has_unit_loss_at_every_level(preset):
    """Gaussian data of the right deviation: E[R^2] = 1 at each level, to Monte Carlo error."""
    x0 = preset.sigma_data * torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    report = preset.loss(Zero(), x0, key=ld.RandomKey(3))
    assert report.loss.item() == pytest.approx(1, abs=6 * (2 / 64 / 4096) ** 0.5)
    bands = report.per_sample[report.level.log_snr.argsort()].chunk(16)
    for band in bands:
        assert band.mean().item() == pytest.approx(1, abs=6 * (2 / 64 / 256) ** 0.5)


def _objectives():
    for schedule in SCHEDULES:
        for preconditioning in PRECONDITIONINGS:
            yield schedule, preconditioning


@pytest.mark.parametrize(("schedule", "preconditioning"), list(_objectives()), ids=repr)
def test_every_combination_is_finite_or_refused(schedule, preconditioning):
    """Both ends of the axis, float32, loss and gradient, under every weighting and density."""
    if refused(schedule, preconditioning):
        with pytest.raises(ValueError, match=r"SNR = 0.*Use the target V, Flow or X0"):
            ld.DiffusionObjective(schedule, ld.UniformTime(), preconditioning, ld.Constant())
        return
    for weighting in WEIGHTINGS:
        objective = ld.DiffusionObjective(schedule, ld.UniformTime(), preconditioning, weighting)
        network = Scaled().float()
        x0 = torch.linspace(-1, 1, 24).reshape(8, 3)
        level = schedule(torch.tensor([1e-7, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-7, 1]))
        report = objective.loss_at(network, x0, x0.flip(0), level)
        report.loss.backward()
        assert report.per_sample.isfinite().all()
        assert network.value.grad.isfinite()


@pytest.mark.parametrize("density", DENSITIES, ids=repr)
def test_loss_draws_from_the_density(density):
    objective = ld.DiffusionObjective(ld.EDMSchedule(), density, ld.EDMPreconditioning(), ld.EDMWeighting())
    key = ld.RandomKey(4, 1, 2)
    drawn = objective.loss(Zero(), torch.zeros(512, 2).double(), key=key).level.log_snr
    u = (torch.arange(512).double() + 0.5) / 512
    expected = density.quantile(u, objective.schedule)
    assert (drawn.sort(descending=True).values - expected)[8:-8].abs().max() < 1.0
    assert drawn.mean().item() == pytest.approx(expected.mean().item(), abs=0.05)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("schedule", SCHEDULES[:4], ids=repr)
def test_a_constant_weight_is_the_plain_error_of_the_target(schedule, target):
    """|y - y_hat|^2 from the denoiser's guess, by the target's own definition: a second route to the loss."""
    level = schedule(torch.linspace(0.05, 0.95, 7, dtype=torch.float64))
    generator = torch.Generator().manual_seed(5)
    x0, noise = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    for preconditioning in (ld.EDMPreconditioning(target, 0.8), ld.DDPMPreconditioning(target)):
        objective = ld.DiffusionObjective(schedule, ld.UniformTime(), preconditioning, ld.Constant())
        x_t = level.diffuse(x0, noise)
        guess = objective.denoise(Scaled(), x_t, level)
        implied = (x_t - level.alpha[:, None] * guess) / level.sigma[:, None]
        plain = (target.of(x0, noise, level) - target.of(guess, implied, level)).square().mean(1)
        assert_close(objective.loss_at(Scaled(), x0, noise, level).per_sample, plain, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_edm_weight_counts_data_errors_by_snr_plus_precision(target):
    """w = SNR + 1 / sd^2 on x_0 whatever the network predicts (Karras et al. 2022, Table 1)."""
    level = ld.LinearSchedule()(torch.linspace(0.05, 0.95, 7, dtype=torch.float64))
    x0, noise = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for preconditioning in (
        ld.EDMPreconditioning(target, 0.8),
        ld.DDPMPreconditioning(target, sigma_data=0.8),
    ):
        objective = ld.DiffusionObjective(
            ld.LinearSchedule(), ld.UniformTime(), preconditioning, ld.EDMWeighting()
        )
        guess = objective.denoise(Scaled(), level.diffuse(x0, noise), level)
        weighted = (level.snr + 1 / 0.8**2) * (guess - x0).square().mean(1)
        assert_close(
            objective.loss_at(Scaled(), x0, noise, level).per_sample, weighted, rtol=1e-7, atol=1e-10
        )


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_float32_whatever_the_autocast(autocast):
    """A network that autocast does not touch gives the same loss to the bit."""
    x0 = torch.randn(8, 3, generator=torch.Generator().manual_seed(7))
    key = ld.RandomKey(1)
    plain = ld.EDM().loss(Scaled().float(), x0, key=key)
    with torch.autocast("cpu", autocast):
        cast = ld.EDM().loss(Scaled().float(), x0, key=key)
        halved = ld.EDM().loss(Scaled().float(), x0.to(autocast), key=key)
    assert torch.equal(plain.per_sample, cast.per_sample)
    assert halved.per_sample.dtype == halved.level.sigma.dtype == torch.float32


def test_without_a_key_every_call_draws_anew():
    """As in a loop of one's own; torch's seed decides."""
    torch.manual_seed(3)
    first, second = (ld.EDM().loss(Scaled().float(), torch.ones(8, 3)) for _ in "ab")
    torch.manual_seed(3)
    again = ld.EDM().loss(Scaled().float(), torch.ones(8, 3))
    assert not torch.equal(first.level.sigma, second.level.sigma)
    assert torch.equal(first.per_sample, again.per_sample)


def test_low_precision_network_keeps_levels_and_noise_in_float32():
    seen = {}

    class Watching(nn.Linear):
        def forward(self, x, c_noise):
            seen.update(x=x.dtype, c_noise=c_noise.dtype)
            return super().forward(x)

    report = ld.EDM().loss(Watching(3, 3).bfloat16(), torch.ones(4, 3))
    assert seen == {"x": torch.bfloat16, "c_noise": torch.float32}
    assert report.loss.dtype == torch.float32


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_loss_traces_in_one_graph(preset):
    """With level and noise given: no graph break, hence no host synchronisation, and the same number."""
    objective, network = preset(), nn.Linear(3, 3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = network

        def forward(self, x, c_noise):
            return self.linear(x) * c_noise[:, None]

    net = Net()
    x0, noise = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(8))
    level = objective.schedule(torch.linspace(0.1, 0.9, 8))
    compiled = torch.compile(lambda *a: objective.loss_at(net, *a).loss, backend="eager", fullgraph=True)
    assert_close(compiled(x0, noise, level), objective.loss_at(net, x0, noise, level).loss)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_presets_have_copies_of_their_defaults_and_plain_specs(preset):
    first, second = preset(), preset()
    assert first.preconditioning is not second.preconditioning
    assert {name.split(".")[0] for name in first.state_dict()} <= {"weighting"}
    assert json.loads(json.dumps(spec(first)))["class_path"] == f"lightning_diffusion.{preset.__name__}"


def test_ddpm_takes_its_timesteps_from_its_own_table():
    schedule = ld.CosineSchedule(num_steps=100)
    objective = ld.DDPM(schedule=schedule)
    level = NoiseLevel(*(part[[0, 42, 99]] for part in schedule.at(schedule.log_snrs)))
    assert objective.preconditioning(level).c_noise.tolist() == [0, 42, 99]
