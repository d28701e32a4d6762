"""What a spike is, and what follows from one or several: against definitions written with numpy, and invariances."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_diffusion.norms import total_norm
from lightning_diffusion.objective import Report
from lightning_diffusion.schedules import EDMSchedule
from lightning_diffusion.spikes import Action, Series, Spike, SpikeEvent, SpikeMonitor, SpikeRule
from lightning_diffusion.step_values import StepValues, band_means, band_sums

RULE = SpikeRule()


def is_spike(values, x, rule=RULE):
    """The definition in the module's docstring."""
    kept = np.array(values[-rule.window :])
    scale = np.median(np.abs(kept))
    heights = np.arcsinh(kept / scale)
    deviation = 1.4826 * np.median(np.abs(heights - np.median(heights)))
    height = np.arcsinh(x / scale) - np.median(heights)
    return height > max(rule.threshold * deviation, np.arcsinh(rule.ratio) - np.arcsinh(1))


@pytest.mark.parametrize("sign", ["positive", "any", "negative"])
@pytest.mark.parametrize("count", [33, 63, 64, 200])
def test_spikes_are_those_of_the_definition(sign, count):
    generator = np.random.default_rng(count)
    for spread in (0.01, 0.3, 1.0):
        values = np.exp(spread * generator.standard_normal(count))
        values = {"positive": values, "any": values - 1, "negative": -values}[sign].tolist()
        series = Series(RULE, values)
        tried = np.concatenate([np.geomspace(0.5, 1e9, 300), -np.geomspace(1e-3, 10, 50)])
        found = [series.is_spike(x) for x in tried]
        assert found == [is_spike(values, x) for x in tried]
        assert True in found
        assert False in found


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_the_scale_of_values_means_nothing(factor):
    values = np.exp(np.random.default_rng(0).standard_normal(64) * 0.2)
    tried = np.geomspace(0.1, 100, 100)
    assert [Series(RULE, values).is_spike(x) for x in tried] == [
        Series(RULE, factor * values).is_spike(factor * x) for x in tried
    ]


def test_single_wild_values_move_nothing_much():
    values = np.exp(np.random.default_rng(0).standard_normal(64) * 0.2)
    wild = np.concatenate([values[:-10], np.full(10, 1e12)])
    assert Series(RULE, values).is_spike(12.0)
    assert Series(RULE, wild).is_spike(12.0)


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("drift", [0.0, -1e-2])
def test_noise_is_no_spike(spread, drift):
    """Log-normal values, also such that fall: 20,000 in a row."""
    noise = np.random.default_rng(1).standard_normal(20_000)
    series = Series(RULE)
    for step, x in enumerate(np.exp(spread * noise + drift * np.minimum(np.arange(20_000), 500)).tolist()):
        assert not series.is_spike(x), step
        series.add(x)


def test_nothing_finite_is_a_spike_without_history():
    few, zeros = Series(RULE, [1.0] * 31), Series(RULE, [0.0] * 64)
    assert not few.is_spike(1e9)
    assert not zeros.is_spike(1.0)
    few.add(1.0)
    assert few.is_spike(3.01)
    assert not few.is_spike(2.99)
    assert all(Series(RULE).is_spike(x) for x in (math.nan, math.inf, -math.inf))


def judged(rule, *values):
    monitor = SpikeMonitor(rule)
    return [monitor.judge({"loss": x})[0].name for x in values]


def test_several_in_a_row_accuse_the_weights():
    nan, rule = math.nan, SpikeRule(rollback_after=3)
    assert judged(rule, nan, nan, 1.0, nan, nan, nan, nan, nan, nan) == [
        *["SKIP", "SKIP", "TAKE"],
        *["SKIP", "SKIP", "ROLL_BACK"] * 2,
    ]


def test_ten_steps_make_up_for_a_spike():
    often, seldom = [math.nan] + [1.0] * 9, [math.nan] + [1.0] * 10
    rule = SpikeRule(give_up_after=5)
    assert "GIVE_UP" not in judged(rule, *seldom * 100)
    assert judged(rule, *often * 100).index("GIVE_UP") == 400  # 4.1 + 0.1 (n - 41) >= 5 after the n-th spike
    assert judged(rule, *[math.nan] * 5) == ["SKIP", "SKIP", "ROLL_BACK", "SKIP", "GIVE_UP"]


def test_values_of_steps_that_were_not_taken_are_forgotten():
    monitor = SpikeMonitor(RULE)
    for _ in range(64):
        monitor.judge({"loss": 1.0, "norm": 2.0})
    before = monitor.state_dict()["series"]
    _, spikes = monitor.judge({"loss": 1.1, "norm": 50.0})
    assert spikes == (Spike("norm", 50.0, 2.0),)
    assert monitor.state_dict()["series"] == before
    monitor.judge({"loss": 1.1}, counts=False)
    assert monitor.state_dict()["series"] == before


def test_a_monitor_goes_on_from_its_state():
    generator = np.random.default_rng(0)
    values = np.exp(generator.standard_normal(200)) * np.where(generator.random(200) < 0.1, 100, 1)
    rule = SpikeRule(window=16, history=4, threshold=3.0)
    straight, resumed = SpikeMonitor(rule), SpikeMonitor(rule)
    actions = [straight.judge({"loss": x})[0] for x in values[:120].tolist()]
    resumed.load_state_dict(straight.state_dict())
    assert {Action.SKIP, Action.TAKE} <= set(actions)
    for x in values[120:].tolist():
        assert straight.judge({"loss": x}) == resumed.judge({"loss": x})
    assert straight.state_dict() == resumed.state_dict()


def test_an_event_says_it_all_and_comes_back_from_its_state():
    spikes = (Spike("gradient norm", 12.3456, 0.5), Spike("loss", math.inf, 1.0))
    event = SpikeEvent(7, Action.ROLL_BACK, spikes, tuple(range(10)), 3)
    assert str(event) == (
        "Step 7 rolled back to where it was after 3 steps: gradient norm 12.3 (usually 0.5), loss inf (usually 1); "
        "samples 0, 1, 2, 3, 4, 5, 6, 7 and 2 more."
    )
    assert SpikeEvent.from_state(event.state_dict()) == event


def report(batch=300):
    generator = torch.Generator().manual_seed(0)
    log_snr = 4 * torch.randn(batch, generator=generator, dtype=torch.float64)
    losses = torch.rand(batch, generator=generator)
    return Report(losses.mean(), losses, EDMSchedule().at(log_snr)), log_snr


@pytest.mark.parametrize("edges", [[], [0.0], [-6.0, -1.0, 0.5, 4.0]])
def test_bands_are_means_of_the_samples_between_their_edges(edges):
    (_, losses, _), log_snr = report()
    sums, counts = band_sums(losses, log_snr, torch.tensor(edges)).tolist()
    found = band_means(sums, counts, edges)
    ends = [-math.inf, *edges, math.inf]
    inside = [(log_snr > a) & (log_snr <= b) for a, b in pairwise(ends)]
    assert_close(list(found.values()), [float(losses[i].mean()) for i in inside])
    assert sum(counts) == 300


def test_what_is_no_number_stays_in_its_band():
    (_, losses, _), log_snr = report()
    losses[log_snr.argmin()] = torch.nan
    sums, counts = band_sums(losses, log_snr, torch.tensor([0.0])).tolist()
    low, high = band_means(sums, counts, [0.0]).values()
    assert math.isnan(low)
    assert math.isfinite(high)
    assert "loss at log-SNR 0 to inf" in band_means([0.0, 1.0], [0.0, 2.0], [0.0])


def test_processes_judge_the_mean_over_all_samples():
    """Two processes with 100 and 200 samples, their vectors averaged as an all-reduce does."""
    (_, losses, level), log_snr = report()
    watched, parts = StepValues([-1.0, 2.0]), []
    for chosen in (slice(0, 100), slice(100, 300)):
        own = Report(losses[chosen].mean(), losses[chosen], type(level)(*(x[chosen] for x in level)))
        parts.append(watched.vector(own, total_norm([torch.tensor(3.0)]), 1.0))
    found = watched.named(torch.stack(parts).mean(0).tolist())
    expected = band_means(*band_sums(losses, log_snr, torch.tensor([-1.0, 2.0])).tolist(), [-1.0, 2.0])
    assert found.pop("gradient norm") == pytest.approx(3.0)
    found.pop("loss")
    assert found == pytest.approx(expected)


def test_indices_come_worst_first():
    own, _ = report(6)
    watched = StepValues([0.0])
    watched.add_batch({"index": torch.tensor([10, 11, 12])})
    watched.add_batch({"index": [13, 14, 15]})
    assert watched.indices == [10, 11, 12, 13, 14, 15]
    losses = own.per_sample.clone()
    losses[4], losses[1] = torch.nan, 100.0
    watched.vector(own._replace(per_sample=losses), torch.ones(()), 1.0)
    assert watched.indices[:2] == [14, 11]
    watched.forget()
    watched.add_batch(torch.zeros(3))
    assert watched.indices == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 8, "history": 9}, "2 <= history <= window"),
        ({"history": 1}, "2 <= history <= window"),
        ({"threshold": 0.0}, "threshold above 0 and ratio above 1"),
        ({"ratio": 1.0}, "threshold above 0 and ratio above 1"),
        ({"ratio": math.nan}, "threshold above 0 and ratio above 1"),
        ({"rollback_after": 0}, "1 <= rollback_after <= give_up_after"),
        ({"rollback_after": 5, "give_up_after": 4}, "1 <= rollback_after <= give_up_after"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SpikeRule(**options)
