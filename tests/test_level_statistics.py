"""Sums by noise level against their definitions; merging, resuming, and what is never waited for."""

from __future__ import annotations

import math

import pytest
import torch
from sync_counter import SyncCounter
from torch.testing import assert_close

from lightning_diffusion import level_statistics
from lightning_diffusion.level_records import PAIRED, PAIRS, LevelHistory, LevelRecord
from lightning_diffusion.level_statistics import LevelBins, LevelStatistics
from lightning_diffusion.noise_level import NoiseLevel

BINS = LevelBins(-4.0, 4.0, 4)


def level_at(log_snr):
    return NoiseLevel(log_snr.sigmoid().sqrt(), log_snr.neg().sigmoid().sqrt())


def micro_batches(count=40, size=24, seed=0):
    """Losses, levels and gradients with a mean that grows with log-SNR."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        log_snr = 3 * torch.randn(size, generator=generator)
        loss = 1 + torch.rand(size, generator=generator) * log_snr.exp()
        gradient = torch.randn(size, 2, 3, generator=generator) + 0.3 * log_snr[:, None, None]
        yield loss, log_snr, gradient


def filled(batches, references=()):
    statistics = LevelStatistics(BINS, references)
    for loss, log_snr, gradient in batches:
        statistics.add(loss, level_at(log_snr), gradient)
    return statistics


@pytest.fixture(scope="module")
def drawn():
    """Everything that was added, by bin."""
    parts = [torch.cat(part).double() for part in zip(*micro_batches(), strict=True)]
    place = torch.from_numpy(
        sum((parts[1] >= edge).long() for edge in BINS.edges).numpy()
    )  # number of edges at or below
    return [tuple(part[place == k] for part in parts) for k in range(len(BINS))]


@pytest.fixture(scope="module")
def record():
    return filled(micro_batches(), [lambda level: level.snr]).pop()


def test_shares_means_and_variances_are_those_of_each_bin(record, drawn):
    assert all(len(loss) > 20 for loss, _, _ in drawn)
    total = sum(len(loss) for loss, _, _ in drawn)
    assert_close(record.share, torch.tensor([len(loss) / total for loss, _, _ in drawn]).double())
    assert_close(record.loss, torch.stack([loss.mean() for loss, _, _ in drawn]))
    assert_close(record.loss_variance, torch.stack([loss.var() for loss, _, _ in drawn]), rtol=1e-6, atol=0)


def test_gradient_norm_is_the_root_mean_square(record, drawn):
    norms = [gradient.flatten(1).square().sum(1).mean().sqrt() for _, _, gradient in drawn]
    assert_close(record.gradient_norm, torch.stack(norms), rtol=1e-6, atol=0)


def test_signal_is_the_mean_product_of_different_samples(record, drawn):
    """E<g_i, g_j> over i != j is |E g|^2 without bias; noise is what is left of E|g|^2."""
    for k, (_, _, gradient) in enumerate(drawn):
        g, n = gradient.flatten(1), len(gradient)
        products = g @ g.T
        signal = (products.sum() - products.trace()) / (n * (n - 1))
        noise = products.trace() / n - signal
        assert float(record.gradient_snr[k]) == pytest.approx(float(signal / noise), rel=1e-4, abs=1e-6)


def test_ratios_are_of_means_over_the_same_draws(record, drawn):
    ratios = [loss.mean() / log_snr.exp().mean() for loss, log_snr, _ in drawn]
    assert_close(record.over(0), torch.stack(ratios), rtol=1e-5, atol=0)


def test_the_signal_has_no_bias_where_there_is_none():
    """Gradients of mean 0: over many windows of few samples the signal averages to 0 within its standard error."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        statistics = LevelStatistics(LevelBins(-1.0, 1.0, 1))
        statistics.add(
            torch.ones(4),
            level_at(torch.zeros(4)),
            torch.randn(4, 50, generator=generator, dtype=torch.float32),
        )
        sums = statistics.pop().sums[1]
        found.append(float(sums[PAIRED] / sums[PAIRS]))
    found = torch.tensor(found)
    assert abs(found.mean()) < 3 * found.std() / math.sqrt(len(found))
    assert found.std() < 10, "a biased estimate is 50 / 4 above"


def test_samples_that_are_not_finite_are_left_out_with_their_gradients():
    loss, level = torch.tensor([1.0, math.nan, 3.0, math.inf]), level_at(torch.zeros(4))
    gradient = torch.tensor([[1.0, 0], [1, 1], [math.nan, 2], [3, 0]])
    statistics = LevelStatistics(LevelBins(-1.0, 1.0, 1))
    statistics.add(loss, level, gradient)
    record = statistics.pop()
    assert (record.draws, float(record.loss[1])) == (2, 2.0)
    assert float(record.gradient_norm[1]) ** 2 == pytest.approx((1 + 2 + 9) / 3)
    assert float(record.sums[1, PAIRED]) == pytest.approx(25 + 1 - 12)


def test_both_ends_are_open_and_bins_are_named_by_their_edges():
    statistics = LevelStatistics(BINS)
    zero, one = torch.zeros(1), torch.ones(1)
    for level in (
        NoiseLevel(zero, one),
        NoiseLevel(one, zero),
        level_at(one),
        level_at(torch.tensor([-2.0])),
    ):
        statistics.add(one, level)
    assert statistics.pop().counts.tolist() == [1, 0, 1, 1, 0, 1]
    assert BINS.names == ["below_-4", "-4_to_-2", "-2_to_0", "0_to_2", "2_to_4", "above_4"]


def test_bins_without_draws_know_nothing():
    record = LevelStatistics(BINS, [lambda level: level.snr]).pop()
    assert record.draws == 0
    for values in (
        record.loss,
        record.loss_variance,
        record.gradient_norm,
        record.gradient_snr,
        record.over(0),
    ):
        assert values.isnan().all()


def test_a_factor_counts_as_if_gradients_had_been_multiplied():
    loss, log_snr, gradient = next(micro_batches())
    scaled, plain = LevelStatistics(BINS), LevelStatistics(BINS)
    scaled.add(loss, level_at(log_snr), gradient, 32.0)
    plain.add(loss, level_at(log_snr), 32 * gradient)
    assert_close(scaled.pop().sums, plain.pop().sums)


def test_of_large_outputs_some_elements_stand_for_all(monkeypatch):
    monkeypatch.setattr(level_statistics, "_ELEMENTS", 600)
    generator = torch.Generator().manual_seed(0)
    gradient = 0.5 + torch.randn(2000, 3, 20, 20, generator=generator)
    statistics = LevelStatistics(LevelBins(-1.0, 1.0, 1))
    statistics.add(torch.ones(2000), level_at(torch.zeros(2000)), gradient)
    record = statistics.pop()
    assert float(record.gradient_norm[1]) == pytest.approx(math.sqrt(1200 * 1.25), rel=0.01)
    assert float(record.gradient_snr[1]) == pytest.approx(0.25, rel=0.02)


def test_processes_together_are_one_process_with_all_samples():
    """The sum of the sums of two is what one has that saw everything."""
    batches = list(micro_batches(10))
    halves = [filled(batches[::2]), filled(batches[1::2])]
    states = [half.state_dict() for half in halves]
    by_shape = {tuple(states[0][name].shape): states[0][name] for name in states[0]}
    together = halves[1].pop(lambda x: x + by_shape[tuple(x.shape)])
    assert_close(together.sums, filled(batches).pop().sums, rtol=1e-5, atol=1e-3)


def test_going_on_from_a_state_changes_nothing():
    batches = list(micro_batches(50))
    before = filled(batches[:21])
    state = {name: x.clone() for name, x in before.state_dict().items()}
    resumed = LevelStatistics(BINS)
    resumed.load_state_dict(state)
    for statistics in (before, resumed):
        for loss, log_snr, gradient in batches[21:]:
            statistics.add(loss, level_at(log_snr), gradient)
    assert torch.equal(before.pop().sums, resumed.pop().sums)


def test_nothing_waits_for_the_device():
    batches = list(micro_batches(70))
    statistics = LevelStatistics(BINS, [lambda level: level.snr])
    with SyncCounter() as counter:
        for loss, log_snr, gradient in batches:
            statistics.add(loss, level_at(log_snr), gradient)
    assert counter.calls == []


def test_a_long_history_keeps_every_sum():
    history = LevelHistory(limit=8)
    for number in range(1, 101):
        history.add(10 * (number - 1), 10 * number, LevelRecord(torch.full((3, 8), float(number))))
    assert len(history.records) <= 8
    assert float(sum(record.sums for record in history.records)[0, 0]) == 5050
    assert [first for first, _ in history.steps[1:]] == [last for _, last in history.steps[:-1]]
    again = LevelHistory(8)
    again.load_state_dict(history.state_dict())
    assert (again.steps, len(again.records)) == (history.steps, len(history.records))


@pytest.mark.parametrize(("low", "high", "count"), [(1.0, 1.0, 4), (-1.0, math.inf, 4), (-1.0, 1.0, 0)])
def test_impossible_bins_are_refused(low, high, count):
    with pytest.raises(ValueError, match=r"expected (two log-SNRs that rise|1 or more)"):
        LevelBins(low, high, count)
