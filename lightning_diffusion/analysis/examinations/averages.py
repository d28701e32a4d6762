"""Averages of the weights, run over as many steps as the training will have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lightning_diffusion.analysis.findings import Examination, Finding, Section, Severity, Table
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.callbacks.ema import EMA
from lightning_diffusion.profiles import Profile

_BLOCKS = 10_000  # into which longer runs are divided
_FOREIGN = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")
_INITIAL, _MOSTLY_INITIAL = 0.01, 0.1
_SHORT = 1e-3  # of the steps
_FEW, _TOO_FEW = 16, 4  # snapshots
_POWER = "trainer.callbacks: [PowerFunctionEMA]  # in place of this one, beside the others"


class Reach(NamedTuple):
    """How far an average looks back at the end: share left of its first weights, mean age of the rest, in steps."""

    initial: float
    age: float


class AveragesExamination(Examination):
    """Lengths against the number of steps, snapshots against the widths that they are to rebuild."""

    name = "averages"

    def __call__(self, patient: Patient) -> Section:
        callbacks = patient.trainer.callbacks
        own = [callback for callback in callbacks if isinstance(callback, EMA)]
        if not own:
            foreign = any(type(callback).__name__ in _FOREIGN for callback in callbacks)
            return Section(self.name, () if foreign else (_NONE,))
        total = patient.total_steps
        if total is None:
            return Section(self.name, (_ENDLESS,))
        found, rows = [], []
        for callback in own:
            reaches = {
                name: reach_of(profile, callback, patient, total) for name, profile in _named(callback)
            }
            found += [f for name, reach in reaches.items() for f in _length(name, callback, reach, total)]
            found += _snapshots(callback, total)
            rows += [_row(name, callback, reach, total) for name, reach in reaches.items()]
        header = ("average", "mean age of its weights", "share of the run", "left of the first weights")
        return Section(self.name, tuple(found), (Table(f"After {total} steps", header, tuple(rows)),))


_NONE = Finding(
    "no-average",
    Severity.WARNING,
    "No average of the weights is kept: averaged weights draw far better samples.",
    "no EMA among the callbacks",
    "trainer.callbacks+: PowerFunctionEMA",
)
_ENDLESS = Finding(
    "endless",
    Severity.NOTE,
    "Nothing limits the number of steps, so averages cannot be held against it.",
    "max_steps and max_epochs are unlimited",
    "trainer.max_steps: 100000",
)


def reach_of(profile: Profile, callback: EMA, patient: Patient, total: int) -> Reach:
    """By the profile's own shares, from `start_step` to the end; clocks in images count those of all devices."""
    images = patient.batch_size * patient.trainer.accumulate * patient.trainer.devices
    per_step = images if profile.clock == "images" else 1
    steps = total - callback.start_step
    if steps <= 0:
        return Reach(1.0, 0.0)
    blocks = min(steps, _BLOCKS)
    length = steps / blocks
    kept, age = 1.0, 0.0
    for block in range(1, blocks + 1):
        t = (callback.start_step + block * length) * per_step
        beta = float(profile.beta(t, length * per_step))
        kept, age = kept * beta, beta * (age + (1 - kept) * length)
    return Reach(kept, age / (1 - kept) if kept < 1 else float(steps))


def _named(callback: EMA) -> list[tuple[str, Profile]]:
    return [(f"{name} ({profile!r})", profile) for name, profile in callback.profiles.items()]


def _length(name: str, callback: EMA, reach: Reach, total: int) -> Iterator[Finding]:
    if callback.start_step >= total:
        title = "The average never begins."
        evidence = f"start_step {callback.start_step} of {name}, the run has {total} steps"
        yield Finding("average-length", Severity.ERROR, title, evidence, _POWER)
    elif reach.initial > _INITIAL:
        title = "An average is longer than the run: it still holds the weights that the network began with."
        evidence = f"{name}: {reach.initial:.0%} of it are the first weights after {total} steps"
        severity = Severity.ERROR if reach.initial > _MOSTLY_INITIAL else Severity.WARNING
        yield Finding("average-length", severity, title, evidence, _POWER)
    elif reach.age < _SHORT * total:
        title = "An average is short: it is hardly more than the last weights."
        evidence = f"{name}: its weights are {reach.age:.3g} steps old on average, {reach.age / total:.2%} of the run"
        yield Finding("average-length", Severity.WARNING, title, evidence, _POWER)


def _snapshots(callback: EMA, total: int) -> Iterator[Finding]:
    plan: Any = callback.snapshots
    if plan is None:
        return
    every = plan.every_n_steps or max(1, total // 64)
    number = min(total // every, plan.keep or total)
    if number < _FEW:
        evidence = f"{number} times of {len(callback.profiles)} widths, one every {every} of {total} steps"
        title = "Too few snapshots to rebuild averages of other widths well; 32 to 64 are usual."
        severity = Severity.ERROR if number < _TOO_FEW else Severity.WARNING
        yield Finding("snapshots", severity, title, evidence, f"every_n_steps: {max(1, total // 48)}")
    if len(callback.profiles) < 2:
        title = "Snapshots of one width rebuild others badly; two are usual."
        yield Finding(
            "snapshots", Severity.WARNING, title, f"widths {[*callback.profiles]}", "sigma_rels: [0.05, 0.10]"
        )


def _row(name: str, callback: EMA, reach: Reach, total: int) -> tuple[str, ...]:
    return name, f"{reach.age:.0f} steps", f"{reach.age / total:.1%}", f"{reach.initial:.1%}"
