"""What the doctor measures against closed forms and other routes to it; what it says, writes and leaves alone."""

import re

import lightning as L
import pytest
import torch
from foreign import QUIET
from small_module import module, network
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from torch.utils.data import DataLoader

import lightning_diffusion as ld
from lightning_diffusion.analysis.doctor import examine
from lightning_diffusion.analysis.examinations.averages import reach_of
from lightning_diffusion.analysis.findings import Finding, Picture, Section, Severity, Table
from lightning_diffusion.analysis.level_profile import LargestLogit, attention_growth, level_profile
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.report import Report
from lightning_diffusion.analysis.report_page import page
from lightning_diffusion.analysis.trained_levels import DataMoments, Start, TrainedLevels, gain_at
from lightning_diffusion.analysis.trainer_settings import TrainerSettings
from lightning_diffusion.callbacks import EMA, PostHocEMA, PowerFunctionEMA
from lightning_diffusion.cli import main
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.plots import dark_paper, style

VARIANCES = torch.tensor([4.0, 1.0, 0.25, 0.0], dtype=torch.float64)


def normal_data(n=200_000):
    return torch.randn(n, 4, dtype=torch.float64) * VARIANCES.sqrt()


def patient(x=None, settings=None, **parts):
    data = DigitsDataModule(batch_size=64) if x is None else batches(x)
    return Patient(module(**parts), data, TrainerSettings(settings or {"max_steps": 100}), steps=3)


def batches(x):
    return DataLoader(list(zip(*x, strict=True)) if isinstance(x, tuple) else list(x), 64)


def unlabelled(x, **parts):
    return patient(x, network=network(0, tuple(x.shape[1:])), **parts)


def digits(n=192):
    return torch.cat([b["image"] for b in DigitsDataModule().train_dataloader()])[:n]


def checks(report, severity=None):
    return [f.check for _, f in report.findings if severity in (None, f.severity)]


def test_gain_is_what_regression_of_the_residual_on_x_t_explains():
    torch.manual_seed(0)
    x0, objective = normal_data(), ld.EDM(sigma_data=float(VARIANCES.mean()) ** 0.5)
    for log_snr in (-4.0, 0.0, 3.0):
        level = objective.schedule.at(torch.tensor([log_snr], dtype=torch.float64)).expand(len(x0))
        noise = torch.randn_like(x0)
        x, residual = level.diffuse(x0, noise), objective.preconditioning.residual(x0, noise, level)
        slope = (x * residual).sum(0) / (x * x).sum(0)
        explained = 1 - (residual - slope * x).square().mean() / residual.square().mean()
        gain = gain_at(DataMoments(VARIANCES, 0.0), torch.tensor([log_snr]), objective)
        assert_close(gain.item(), explained.item(), atol=5e-3, rtol=0)


def test_the_start_of_sampling_is_a_divergence_of_gaussians():
    mean, alpha, sigma = torch.tensor([0.3, -1.0, 0.0, 2.0]).double(), 0.2, 0.9
    trained = MultivariateNormal(alpha * mean, torch.diag(alpha**2 * VARIANCES + sigma**2))
    start = MultivariateNormal(torch.zeros(4).double(), sigma**2 * torch.eye(4).double())
    levels = NoiseLevel(torch.tensor([alpha, 1.0]).double(), torch.tensor([sigma, 0.0]).double())
    found = Start.of(levels, DataMoments(VARIANCES, float(mean.square().sum())))
    assert_close(found.nats, kl_divergence(trained, start).item())


@pytest.mark.parametrize("mean", [-1.2, 2.0, 5.0])
def test_draws_too_noisy_to_learn_from_are_a_share_of_the_normal_distribution(mean):
    data = DataMoments(VARIANCES, 0.0)
    levels = TrainedLevels.of(ld.EDM(density=ld.LogNormalSigma(mean, 1.2)), data)
    grid = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    edge = grid[gain_at(data, grid, levels.objective) >= 0.01][0] / -2  # ln sigma
    share = 1 - torch.distributions.Normal(mean, 1.2).cdf(edge)
    assert_close(levels.idle_noise, share.item(), atol=1e-3, rtol=0)


def test_span_and_concentration_of_a_weight_of_two_values():
    class Step(ld.Weighting):
        space = ld.EDMWeighting.space

        def __call__(self, level, setting):
            return torch.where(level.log_snr > 4, 1e7, 1.0).to(level.sigma)

    density = ld.Truncated(ld.LogUniformSigma(), -6.0, 6.0)  # one draw in six is above 4
    objective = ld.DiffusionObjective(ld.EDMSchedule(), density, ld.EDMPreconditioning(), Step())
    levels = TrainedLevels.of(objective, DataMoments(VARIANCES, 0.0))
    assert_close(levels.span, 1e7)
    assert_close(levels.concentration, 0.9 / 6, atol=1e-3, rtol=0)


def reach(callback, total=1600):
    (profile,) = callback.profiles.values()
    return reach_of(profile, callback, patient(), total)


def test_averages_reach_back_as_far_as_their_weights_say():
    fixed = reach(EMA(0.999))
    assert_close(fixed.initial, 0.999**1600)
    ages = torch.arange(1600, dtype=torch.float64)
    share = 0.001 * 0.999**ages
    assert_close(fixed.age, ((share * ages).sum() / share.sum()).item(), rtol=1e-6, atol=0)
    wide = ld.PowerFunction(0.1).exponent  # the mean of A tau^(A-1) / t^A is t A / (A + 1)
    assert_close(reach(PowerFunctionEMA(0.1)).age, 1600 / (wide + 1), rtol=5e-3, atol=0)
    assert reach(PowerFunctionEMA(0.1)).initial == 0


def test_the_largest_logit_is_that_of_the_products():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with LargestLogit() as watch:
        scaled_dot_product_attention(q, k, k)
    assert_close(watch.largest, (torch.einsum("bhid,bhjd->bhij", q, k).abs().max() / 8**0.5).item())


def test_conditioning_is_unit_variance_under_edm_and_not_without_it():
    one = patient()
    profile = level_profile(one.prepared(), one.drawn)
    for part in (profile.inputs, profile.residuals):
        assert_close(part, torch.ones_like(part), atol=0.05, rtol=0)
    assert float(profile.outputs.max()) == 0
    bare = ld.DiffusionObjective(
        ld.GeometricSchedule(), ld.UniformTime(), ld.DDPMPreconditioning(), ld.Constant()
    )
    report = examine(patient(objective=bare, representation=ld.Standardize(sigma_data=1.0)), ["conditioning"])
    assert "input" in checks(report, Severity.ERROR)


BROKEN = {
    "nan": (lambda x: x.index_fill(0, torch.tensor([3]), torch.nan), "nan"),
    "integers": (lambda x: x.mul(100).byte(), "range"),
    "repeated": (lambda x: x[:32].repeat(6, 1, 1, 1), "duplicates"),
    "partly constant": (lambda x: x.index_fill(0, torch.arange(20), -1.0), "constant"),
    "off centre": (lambda x: x / 4 + 0.7, "range"),
    "another size": (lambda x: nn.functional.pad(x, (1, 1, 1, 1)), "size"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_are_named(name):
    spoil, check = BROKEN[name]
    one = patient(spoil(digits()), network=network(0), representation=ld.Identity())
    assert check in checks(examine(one, ["data"]))


def test_rare_classes_are_named():
    x = digits()
    labels = torch.arange(10).repeat(20)[: len(x)].where(torch.arange(len(x)) < 12, 7)
    twice = (torch.cat([x, x.flip(3)]), torch.cat([labels, labels]))
    assert "classes" in checks(examine(patient(twice), ["data"]), Severity.WARNING)


def test_no_average_and_few_snapshots():
    assert checks(examine(patient(), ["averages"])) == ["no-average"]
    few = {"max_steps": 100, "callbacks": [PostHocEMA(every_n_steps=40)]}
    assert checks(examine(patient(settings=few), ["averages"]), Severity.ERROR) == ["snapshots"]


def test_a_trainer_made_in_python_is_understood():
    trainer = L.Trainer(**QUIET, max_steps=200, callbacks=[EMA(0.9999)])
    report = examine(Patient(module(), DigitsDataModule(), trainer, 3), ["averages"])
    assert checks(report, Severity.ERROR) == ["average-length"]


def test_time_is_measured_and_the_patient_left_as_it_was():
    one = patient()
    before = {name: value.clone() for name, value in one.module.state_dict().items()}
    random = torch.get_rng_state()
    section = examine(one, ["objective", "conditioning", "time"]).sections[-1]
    assert torch.equal(torch.get_rng_state(), random)
    after = one.module.state_dict()
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)
    parts = {row[0]: row[1] for row in section.tables[0].rows}
    assert re.fullmatch(r"[\d.e+-]+ m?s", parts["network, forward and backward"])


def test_the_page_is_one_file_escaped_light_and_dark():
    def chart(dark):
        from matplotlib.figure import Figure

        with style():
            return Figure(figsize=(1, 1))

    section = Section(
        "data",
        (Finding("x", Severity.ERROR, "<b>", "1 < 2", "a: {b}"),),
        (Table("t", ("", "n"), (("r", "1"),)),),
        (Picture("p", chart),),
    )
    text = page(Report("<subject>", (section,)))
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert len(set(re.findall(r"data:image/png;base64,[\w+/=]+", text))) == 2
    assert not re.search(r"(src|href|srcset)=\"(?!data:)", text)


def test_charts_on_dark_paper_are_dark():
    from matplotlib.figure import Figure

    with dark_paper(), style():
        dark = Figure().get_facecolor()
    with style():
        light = Figure().get_facecolor()
    assert sum(dark[:3]) < 0.5
    assert sum(light[:3]) == 3


def test_the_command_writes_a_page_and_says_by_its_status_how_bad_it_is(tmp_path, capsys):
    line = ["doctor", "--config", "configs/digits.yaml", "--only", "objective,averages", "--steps", "3"]
    assert main([*line, "--html", str(tmp_path / "page.html")]) == 0
    assert "<h2>objective</h2>" in (tmp_path / "page.html").read_text()
    assert main([*line, "--trainer.callbacks", "[]"]) == 1
    assert "no-average" in capsys.readouterr().out
    zero = '{"class_path": "DDPM", "init_args": {"schedule": {"class_path": "LinearSchedule", "init_args": '
    zero += '{"zero_terminal_snr": true}}}}'
    assert main([*line, "--model.objective", zero]) == 2
    assert "configuration/singular" in capsys.readouterr().out


def test_a_table_that_ends_too_early_is_a_mismatch_at_the_start_of_sampling():
    short = ld.DDPM(ld.LinearSchedule(num_steps=100))  # SNR 0.57 at its end
    one = patient(objective=short, representation=ld.Standardize(sigma_data=1.0), sampler=ld.DDIM())
    assert "terminal-snr" in checks(examine(one, ["objective"]), Severity.WARNING)


class PlainAttention(nn.Module):
    """Without the normalised queries and keys by which our own networks bound their logits."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, c_noise):
        q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, -1)
        return self.out(scaled_dot_product_attention(q, k, v)).view_as(x)


def growth(net, lr, **parts):
    torch.manual_seed(0)
    one = patient(network=net(), optimizer=lambda p: torch.optim.AdamW(p, lr=lr), **parts)
    return attention_growth(one, torch.device("cpu"))


def test_attention_logits_grow_with_the_learning_rate_and_stay_without_one():
    at_once = {"label_dropout": 1.0, "learning_rate": ld.WarmupConstant(warmup_steps=0)}
    before, after, steps = growth(PlainAttention, 1.0, **at_once)
    assert steps == 3
    assert after > 10 * before > 0
    still = growth(PlainAttention, 0.0, **at_once)
    assert still[0] == still[1]
    assert growth(network, 1.0) is None
