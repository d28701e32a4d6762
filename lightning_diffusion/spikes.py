r"""Spikes: values far above what they were shortly before, and what follows from them.

    s     median magnitude of a series' last `window` values
    y     asinh(x / s): logarithmic above s and linear around zero, so that losses below zero will do
    m, d  median of y, and 1.4826 times the median of |y - m|: the deviation, if y is normal

x is a spike if it is not finite, or if y - m is above threshold d and above what `ratio` times the median would be.
Median and deviation do not notice single wild values, and those of steps that were not taken are not kept.

A step that is not taken leaves the weights as they are. So one spike accuses the batch, several in a row, of batches
that have nothing in common, accuse the weights: then they are put back to what they were.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, NamedTuple

NORMAL = 1.4826  # deviation of a normal distribution by its median absolute deviation
BAND_EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # log-SNR
RELIEF = 10  # steps that are taken make up for one that is not


@dataclass(frozen=True)
class SpikeRule:
    """What is a spike, and what is done about it.

    Args:
        window: values of a series that are remembered.
        history: values before anything finite can be a spike, at least 2 and at most `window`.
        threshold: robust deviations above the median, above 0.
        ratio: and times the median, above 1.
        rollback_after: spikes in a row that put the weights back; the ones before skip their steps.
        give_up_after: skipped steps that end the run; ten steps that are taken make up for one.
    """

    window: int = 64
    history: int = 32
    threshold: float = 8.0
    ratio: float = 3.0
    rollback_after: int = 3
    give_up_after: int = 50

    def __post_init__(self) -> None:
        if not 2 <= self.history <= self.window:
            raise ValueError(f"Found {self}; expected 2 <= history <= window, such as 32 and 64.")
        if not (self.threshold > 0 and 1 < self.ratio < math.inf):
            raise ValueError(
                f"Found {self}; expected threshold above 0 and ratio above 1, such as 8.0 and 3.0."
            )
        if not 1 <= self.rollback_after <= self.give_up_after:
            raise ValueError(
                f"Found {self}; expected 1 <= rollback_after <= give_up_after, such as 3 and 50."
            )


class Spike(NamedTuple):
    """A value far above the median of those before it (NaN where there are none)."""

    series: str
    value: float
    usual: float

    def __str__(self) -> str:
        return f"{self.series} {self.value:.3g} (usually {self.usual:.3g})"


class Action(Enum):
    """What becomes of a step."""

    TAKE = "taken"
    SKIP = "skipped"
    ROLL_BACK = "rolled back"
    GIVE_UP = "given up"


@dataclass(frozen=True)
class SpikeEvent:
    """A step that was not taken.

    Args:
        step: its number, counted from 0.
        action: what was done.
        spikes: by series.
        indices: of the samples in its batches, those of large losses first; empty where batches have no "index".
        to_step: steps that had been done when the weights were what they are now.
    """

    step: int
    action: Action
    spikes: tuple[Spike, ...]
    indices: tuple[int, ...] = ()
    to_step: int | None = None

    def __str__(self) -> str:
        back = "" if self.to_step is None else f" to where it was after {self.to_step} steps"
        more = f" and {len(self.indices) - 8} more" if len(self.indices) > 8 else ""
        samples = f"; samples {', '.join(map(str, self.indices[:8]))}{more}" if self.indices else ""
        return f"Step {self.step} {self.action.value}{back}: {', '.join(map(str, self.spikes))}{samples}."

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        state = asdict(self) | {"action": self.action.value, "indices": list(self.indices)}
        return state | {"spikes": [list(spike) for spike in self.spikes]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SpikeEvent:
        """From plain data."""
        spikes = tuple(Spike(*spike) for spike in state["spikes"])
        action, indices = Action(state["action"]), tuple(state["indices"])
        return cls(**{**state, "action": action, "spikes": spikes, "indices": indices})


class Series:
    """The last values of a quantity, with their order statistics."""

    def __init__(self, rule: SpikeRule, values: Iterable[float] = ()) -> None:
        self.rule = rule
        self.values: deque[float] = deque(maxlen=rule.window)
        self._sorted: list[float] = []
        for value in values:
            self.add(value)

    def add(self, value: float) -> None:
        """Remember a value, which has to be finite, and forget the oldest."""
        if len(self.values) == self.rule.window:
            del self._sorted[bisect_left(self._sorted, self.values[0])]
        self.values.append(value)
        insort(self._sorted, value)

    @property
    def median(self) -> float:
        """Of the values; NaN if there are none."""
        return _median(self._sorted)

    def is_spike(self, value: float) -> bool:
        """Whether a value is far above the others, or not finite."""
        if not math.isfinite(value):
            return True
        scale = self._magnitude()
        if len(self.values) < self.rule.history or scale == 0:
            return False
        height = math.asinh(value / scale) - math.asinh(self.median / scale)
        least = math.asinh(self.rule.ratio) - math.asinh(1.0)
        return height > least and height > self.rule.threshold * self._deviation(scale)

    def _magnitude(self) -> float:
        if not self._sorted or self._sorted[0] >= 0:
            return self.median
        return _median(sorted(map(abs, self._sorted)))

    def _deviation(self, scale: float) -> float:
        """Of asinh(x / scale), robust; asinh keeps the order."""
        heights = [math.asinh(value / scale) for value in self._sorted]
        middle = _median(heights)
        return NORMAL * _median(sorted(abs(height - middle) for height in heights))


class SpikeMonitor:
    """Judges the values of one step after the other."""

    def __init__(self, rule: SpikeRule) -> None:
        self.rule = rule
        self.series: dict[str, Series] = {}
        self.in_a_row, self.debt = 0, 0

    def judge(self, values: Mapping[str, float], counts: bool = True) -> tuple[Action, tuple[Spike, ...]]:
        """What to do with a step that has these values; they are remembered if it is taken and `counts`."""
        for name in values.keys() - self.series.keys():
            self.series[name] = Series(self.rule)
        known = ((name, value, self.series[name]) for name, value in values.items())
        spikes = tuple(Spike(name, x, series.median) for name, x, series in known if series.is_spike(x))
        if spikes:
            return self._refuse(), spikes
        return (self._accept(values) if counts else Action.TAKE), ()

    def _accept(self, values: Mapping[str, float]) -> Action:
        for name, value in values.items():
            self.series[name].add(value)
        self.in_a_row, self.debt = 0, max(self.debt - 1, 0)
        return Action.TAKE

    def _refuse(self) -> Action:
        self.in_a_row, self.debt = self.in_a_row + 1, self.debt + RELIEF
        if self.debt >= RELIEF * self.rule.give_up_after:
            return Action.GIVE_UP
        if self.in_a_row < self.rule.rollback_after:
            return Action.SKIP
        self.in_a_row = 0
        return Action.ROLL_BACK

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        values = {name: list(series.values) for name, series in self.series.items()}
        return {"series": values, "in_a_row": self.in_a_row, "debt": self.debt}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from plain data."""
        self.series = {name: Series(self.rule, values) for name, values in state["series"].items()}
        self.in_a_row, self.debt = state["in_a_row"], state["debt"]


def _median(ordered: Sequence[float]) -> float:
    half, odd = divmod(len(ordered), 2)
    if not ordered:
        return math.nan
    return ordered[half] if odd else (ordered[half - 1] + ordered[half]) / 2
