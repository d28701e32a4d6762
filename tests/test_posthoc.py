"""Reconstruction against published coefficients, and against averages that were really kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lightning_diffusion.averaging import Average
from lightning_diffusion.posthoc import predicted_error, solve_coefficients
from lightning_diffusion.profiles import PowerFunction

REFERENCE = json.loads((Path(__file__).parent / "reference" / "posthoc_ema.json").read_text())["posthoc"]


def snapshots(number: int, until: float = 1000.0) -> tuple[list[float], list[float]]:
    times = [until * (i + 1) / number for i in range(number) for _ in range(2)]
    return times, [0.05, 0.10] * number


@pytest.mark.parametrize("case", REFERENCE, ids=lambda c: f"{len(c['in_ofs'])}-{c['out_std']}")
def test_coefficients_are_the_published_ones(case):
    found = solve_coefficients(case["in_ofs"], case["in_std"], case["out_ofs"], case["out_std"])
    assert_close(found, torch.tensor(case["coefficients"], dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", ["white", "random_walk"])
@pytest.mark.parametrize("wanted", [5, 8, 13])
def test_a_snapshot_rebuilds_itself(metric, wanted):
    times, widths = snapshots(8)
    found = solve_coefficients(times, widths, times[wanted], widths[wanted], metric)
    assert_close(found, torch.eye(16, dtype=torch.float64)[wanted], rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", ["white", "random_walk"])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.2])
def test_coefficients_sum_to_one_and_do_not_depend_on_the_clock(metric, sigma_rel):
    times, widths = snapshots(16)
    found = solve_coefficients(times, widths, 1000.0, sigma_rel, metric)
    assert float(found.sum()) == pytest.approx(1)
    in_images = solve_coefficients([64 * t for t in times], widths, 64e3, sigma_rel, metric)
    assert_close(in_images, found, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("number", "sigma_rel", "white", "walk"),
    [(8, 0.02, 0.28, 0.18), (8, 0.075, 3.7e-3, 2.5e-3), (8, 0.25, 0.065, 8.9e-3), (32, 0.25, 8.0e-3, 4.4e-4)],
)
def test_predicted_errors_on_a_random_walk(number, sigma_rel, white, walk):
    times, widths = snapshots(number)
    errors = [
        predicted_error(
            times, widths, 1000.0, sigma_rel, solve_coefficients(times, widths, 1000.0, sigma_rel, m)
        )
        for m in ("white", "random_walk")
    ]
    assert errors == pytest.approx([white, walk], rel=0.05)


class Walk:
    """Averages of many independent random walks, snapshots of two of them on the way."""

    def __init__(
        self, steps: int = 1024, number: int = 16, kept: tuple[float, ...] = (0.03, 0.07, 0.15, 0.25)
    ):
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.zeros(4000, dtype=torch.float64)
        self.shadows = {s: self.weights.clone() for s in (0.05, 0.1, *kept)}
        averages = [Average(PowerFunction(s), [x], [self.weights]) for s, x in self.shadows.items()]
        self.times: list[float] = []
        self.widths: list[float] = []
        self.snapshots: list[torch.Tensor] = []
        for step in range(1, steps + 1):
            self.weights += torch.randn(4000, dtype=torch.float64, generator=generator)
            for average in averages:
                average.after_step()
            if step % (steps // number) == 0:
                self.keep(step)

    def keep(self, step: int) -> None:
        self.times += [step, step]
        self.widths += [0.05, 0.1]
        self.snapshots += [self.shadows[0.05].clone(), self.shadows[0.1].clone()]

    def error(self, sigma_rel: float, metric: str) -> tuple[float, float]:
        found = solve_coefficients(self.times, self.widths, self.times[-1], sigma_rel, metric)
        rebuilt = sum(x * s for x, s in zip(found.tolist(), self.snapshots, strict=True))
        average = self.shadows[sigma_rel]
        real = float((rebuilt - average).norm() / (average - self.weights).norm())
        return real, predicted_error(self.times, self.widths, self.times[-1], sigma_rel, found)


@pytest.fixture(scope="module")
def walk() -> Walk:
    return Walk()


@pytest.mark.parametrize("metric", ["white", "random_walk"])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.25])
def test_real_averages_are_rebuilt_with_the_error_that_was_predicted(walk, sigma_rel, metric):
    real, predicted = walk.error(sigma_rel, metric)
    assert real == pytest.approx(predicted, rel=0.2, abs=2e-4)
    assert real < 0.05


@pytest.mark.parametrize("time", [0.0, 1001.0])
def test_times_outside_the_run_are_refused(time):
    with pytest.raises(ValueError, match=r"not within the snapshots, whose times are 125 to 1000"):
        solve_coefficients(*snapshots(8), time, 0.07)


def test_too_many_snapshots_are_refused():
    with pytest.raises(ValueError, match=r"of 300 times; .* Leave out every second one"):
        solve_coefficients(*snapshots(300), 1000.0, 0.07)


def test_impossible_widths_are_refused():
    with pytest.raises(ValueError, match=r"sigma_rel=0\.3 is not a width"):
        solve_coefficients(*snapshots(8), 1000.0, 0.3)
