"""An average is a weighting of the past: parameters that are one-hot in time make it visible."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from lightning_diffusion.averaging import (
    Average,
    averages_in,
    gamma_from_sigma_rel,
    load_averaged,
    plan_block,
    power_function_beta,
    resolve_weights,
)
from lightning_diffusion.profiles import (
    FixedDecay,
    HalfLife,
    InverseGamma,
    PowerFunction,
    Profile,
    RatioWarmup,
)

REFERENCE = json.loads((Path(__file__).parent / "reference" / "posthoc_ema.json").read_text())
PROFILES = [
    FixedDecay(0.99),
    PowerFunction(0.1),
    InverseGamma(0.999),
    RatioWarmup(0.999),
    HalfLife(images=50.0, rampup=0.3),
]


class OneHot:
    """Weights that are unit vector number t after step t: their average is the list of their shares."""

    def __init__(self, profile: Profile, steps: int, **options: int) -> None:
        self.weights = torch.zeros(steps + 1, dtype=torch.float64)
        self.weights[0] = 1
        self.shares = self.weights.clone()
        self.average = Average(profile, [self.shares], [self.weights], **options)
        self.t = 0

    def step(self, found_inf: float | None = None) -> None:
        self.average.before_step()
        if not found_inf:
            self.t += 1
            self.weights.zero_()
            self.weights[self.t] = 1
        self.average.after_step(1.0, None if found_inf is None else torch.tensor([found_inf]))


def shares(profile: Profile, steps: int, **options: int) -> torch.Tensor:
    run = OneHot(profile, steps, **options)
    for _ in range(steps):
        run.step()
    return run.shares


def mean_age(share: torch.Tensor) -> float:
    return float((share * torch.arange(len(share)).flip(0)).sum())


def test_exponents_and_decays_are_those_of_an_independent_implementation():
    for sigma_rel, gamma in REFERENCE["std_to_exp"].items():
        assert gamma_from_sigma_rel(float(sigma_rel)) == pytest.approx(gamma, rel=1e-9)
    for row in REFERENCE["beta"]:
        beta = power_function_beta(row["std"], row["t_next"], row["t_delta"])
        assert beta == pytest.approx(row["beta"], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2, 0.28])
def test_a_power_function_average_is_as_wide_as_it_says(sigma_rel):
    share = shares(PowerFunction(sigma_rel), 2000)
    time = torch.arange(2001, dtype=torch.float64) / 2000
    mean = (share * time).sum()
    assert float((share * (time - mean) ** 2).sum().sqrt()) == pytest.approx(sigma_rel, rel=2e-3)


def test_a_fixed_decay_forgets_geometrically():
    share = shares(FixedDecay(0.9), 20)
    want = 0.1 * 0.9 ** torch.arange(20, dtype=torch.float64).flip(0)
    assert_close(share[1:], want)
    assert float(share[0]) == pytest.approx(0.9**20)


def test_inverse_gamma_with_power_one_is_the_mean_of_all_weights():
    share = shares(InverseGamma(decay=0.9999, power=1.0), 50)
    assert_close(share[1:], torch.full((50,), 1 / 50, dtype=torch.float64))


def test_the_ratio_warmup_forgets_the_start_as_a_binomial():
    assert float(shares(RatioWarmup(0.9999), 30)[0]) == pytest.approx(1 / math.comb(39, 9))


def test_a_half_life_in_images_does_not_depend_on_the_batch():
    profile = HalfLife(images=640.0, rampup=math.inf)
    kept = [math.prod(profile.beta(t, batch) for t in range(batch, 641, batch)) for batch in (64, 128, 640)]
    assert kept == pytest.approx([0.5] * 3)


def test_a_half_life_ramps_up_with_the_images_seen():
    assert HalfLife(images=1e9, rampup=0.05).beta(1100.0, 100.0) == pytest.approx(0.5 ** (100 / 50))
    assert HalfLife().beta(64.0, 64.0) == 0


@pytest.mark.parametrize("profile", PROFILES, ids=repr)
def test_a_step_not_taken_keeps_all_and_tensors_say_what_numbers_say(profile):
    for t in (1.0, 2.0, 7.0, 500.0):
        assert profile.beta(t, 0.0) == 1
        tensor = profile.beta(torch.tensor(t, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
        assert float(tensor) == pytest.approx(profile.beta(t, 1.0), rel=1e-12)
        assert 0 <= profile.beta(t, 1.0) < 1


def test_every_profile_is_listed():
    assert {type(p) for p in PROFILES} == set(Profile.__subclasses__())


@pytest.mark.parametrize("profile", PROFILES, ids=repr)
@pytest.mark.parametrize("every", [2, 5, 8])
def test_rare_updates_keep_mass_and_mean_age(profile, every):
    rarely = shares(profile, 80, every=every)
    assert float(rarely.sum()) == pytest.approx(1)
    assert mean_age(rarely) == pytest.approx(mean_age(shares(profile, 80)))
    assert set(rarely.nonzero().flatten().tolist()) <= set(range(0, 81, every))


@pytest.mark.parametrize("profile", PROFILES, ids=repr)
@pytest.mark.parametrize("every", [2, 5, 8])
def test_rare_updates_compound_the_decay_exactly(profile, every):
    start = 80 - every
    before, after = shares(profile, start, every=every), shares(profile, 80, every=every)
    kept = math.prod(profile.beta(float(t), 1.0) for t in range(start + 1, 81))
    assert_close(after[:start], before[:start] * kept, rtol=1e-9, atol=1e-15)


def test_blocks_split_their_mass_as_the_continuous_profile_does():
    """mu = A/(A+1) (t^(A+1) - a^(A+1))/(t^A - a^A), c = (t - mu - 1/2)/dt."""
    for sigma_rel, t, k in [(0.05, 1e4, 100), (0.1, 1e3, 10), (0.2, 500.0, 50)]:
        A, a = gamma_from_sigma_rel(sigma_rel) + 1, t - k
        mu = A / (A + 1) * (t ** (A + 1) - a ** (A + 1)) / (t**A - a**A)
        block = plan_block(PowerFunction(sigma_rel), a, k)
        assert block.share == pytest.approx((t - mu - 0.5) / k, rel=1e-3)
        assert block.kept == pytest.approx(power_function_beta(sigma_rel, t, k), rel=1e-12)


@pytest.mark.parametrize(("every", "published"), [(10, 0.0053), (100, 0.053)])
def test_on_a_random_walk_rare_updates_err_by_half_of_the_unsplit(every, published):
    """Relative to |average - current|; the increments' tails give the expectation exactly."""
    often, rarely = (shares(PowerFunction(0.05), 10_000, every=k) for k in (1, every))
    error = (often - rarely).cumsum(0).square().sum().sqrt()
    distance = often.cumsum(0)[:-1].square().sum().sqrt()
    assert float(error / distance) == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("profile", PROFILES, ids=repr)
@pytest.mark.parametrize("every", [1, 4])
def test_skipped_steps_are_as_if_never_tried(profile, every):
    skipping, plain = OneHot(profile, 24), OneHot(profile, 24)
    for step in range(36):
        skipping.step(found_inf=float(step % 3 == 0))
    for _ in range(24):
        plain.step()
    assert_close(skipping.shares, plain.shares, rtol=1e-9, atol=1e-12)


def test_a_skipped_step_leaves_the_average_bit_equal():
    run = OneHot(PowerFunction(), 10)
    for _ in range(5):
        run.step(found_inf=0.0)
    before, time = run.shares.clone(), run.average.elapsed - run.average.skipped
    run.step(found_inf=1.0)
    assert torch.equal(before, run.shares)
    assert run.average.elapsed - run.average.skipped == time


@pytest.mark.parametrize("every", [1, 4])
def test_skipped_steps_in_a_block_keep_the_decay_exact(every):
    run = OneHot(FixedDecay(0.9), 24, every=every)
    for step in range(24):
        run.step(found_inf=float(step % 2))
    assert float(run.shares.sum()) == pytest.approx(1)
    assert float(run.shares[0]) <= 0.9**12 * 1.2


@pytest.mark.parametrize("every", [1, 3, 4])
def test_before_its_start_an_average_is_the_weights(every):
    run = OneHot(FixedDecay(0.99), 40, every=every, start=12)
    for _ in range(12):
        run.step()
        if run.t % every == 0:
            assert torch.equal(run.shares, run.weights)
    for _ in range(24):
        run.step()
    assert float(run.shares[:13].sum()) == pytest.approx(0.99**24, abs=0.08)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("profile", PROFILES, ids=repr)
def test_a_resumed_average_is_bit_equal(profile, every):
    straight, first = OneHot(profile, 30, every=every), OneHot(profile, 30, every=every)
    for _ in range(30):
        straight.step()
    for _ in range(13):
        first.step(found_inf=None)
    second = OneHot(profile, 30, every=every)
    second.t = first.t
    second.weights.copy_(first.weights)
    second.shares.copy_(first.shares)
    second.average.load_state_dict(first.average.state_dict())
    for _ in range(17):
        second.step()
    assert torch.equal(straight.shares, second.shares)


def test_bfloat16_weights_have_a_float32_average_that_moves():
    weight, shadow = torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([1.0])
    average = Average(FixedDecay(0.9999), [shadow], [weight])
    for _ in range(1000):
        average.after_step()
    assert float(shadow) == pytest.approx(1.5 - 0.5 * 0.9999**1000, abs=1e-5)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, math.nan])
def test_impossible_widths_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"write a number between 0 and 0\.2887"):
        PowerFunction(sigma_rel)


@pytest.mark.parametrize("make", [FixedDecay, InverseGamma, RatioWarmup])
@pytest.mark.parametrize("decay", [1.0, -0.1, 2.0])
def test_impossible_decays_are_refused(make, decay):
    with pytest.raises(ValueError, match=r"is in \[0, 1\); write 0\.999"):
        make(decay)


def test_impossible_warmups_are_refused():
    with pytest.raises(ValueError, match=r"must be positive; write 1\.0 and 2/3"):
        InverseGamma(power=0)
    with pytest.raises(ValueError, match="write rampup=inf for no ramp"):
        HalfLife(images=0)


AVERAGES = {"0.05": {"w": torch.ones(2)}, "0.1": {"w": torch.zeros(2)}}


def test_weights_are_named_by_one_grammar(tmp_path):
    save_file({"w": torch.full((2,), 3.0)}, tmp_path / "w.safetensors")
    assert resolve_weights("online", AVERAGES) is None
    assert resolve_weights("ema", AVERAGES) is AVERAGES["0.05"]
    assert resolve_weights("ema:0.1", AVERAGES) is AVERAGES["0.1"]
    assert_close(resolve_weights(f"{tmp_path}/w.safetensors", {}), {"w": torch.full((2,), 3.0)})


@pytest.mark.parametrize(
    ("spec", "averages", "message"),
    [
        ("ema:0.11", AVERAGES, r"no average '0\.11', only '0\.05', '0\.1'.*Did you mean ema:0\.1\?"),
        ("ema", {}, "trained without the EMA callback.*Write online"),
        ("best", AVERAGES, r"write online, ema, ema:NAME or the path of a \.safetensors file"),
        ("gone.safetensors", AVERAGES, r"'gone\.safetensors' does not exist"),
    ],
)
def test_unknown_weights_are_refused(spec, averages, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resolve_weights(spec, averages)


def test_averages_are_found_wherever_a_checkpoint_keeps_them():
    assert averages_in({"callbacks": {"EMA": {"averages": AVERAGES}}}) == AVERAGES
    assert averages_in({"averages": AVERAGES}) == AVERAGES
    lightnings_own = {"state_dict": AVERAGES["0.1"], "current_model_state": {}, "averaging_state": {}}
    assert averages_in(lightnings_own) == {"ema": AVERAGES["0.1"]}
    assert averages_in({"state_dict": {}}) == {}


def test_averaged_weights_load_under_all_names_of_a_shared_tensor(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    net[1].weight = net[0].weight
    averaged = {name: p.detach().float() + 1 for name, p in net.named_parameters()}
    torch.save(
        {"state_dict": net.state_dict(), "callbacks": {"EMA": {"averages": {"a": averaged}}}}, tmp_path / "c"
    )
    loaded = load_averaged(tmp_path / "c")
    assert loaded.keys() == net.state_dict().keys()
    assert torch.equal(loaded["1.weight"], loaded["0.weight"])
    assert_close(loaded["0.weight"].float(), averaged["0.weight"], rtol=1e-2, atol=1e-2)
    assert loaded["2.running_mean"].equal(net[2].running_mean)
    net.load_state_dict(loaded)
