"""Time several arms in one process: they take turns, so that whatever else the machine does meets all of them.

An arm returns its milliseconds. Figures are medians over rounds with quartiles; ratios and differences are taken within
a round, between arms that ran one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

import numpy as np

Arm = Callable[[], float]
Times = dict[str, np.ndarray]


def in_turns(arms: Mapping[str, Arm], rounds: int, warm_up: int = 2) -> Times:
    """Milliseconds (rounds,) of every arm, after some rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warm_up + rounds):
        for name in _order(list(arms), number):
            times[name].append(arms[name]())
    return {name: np.array(t[warm_up:]) for name, t in times.items()}


def _order(names: list[str], number: int) -> list[str]:
    """Rotating, every other round backwards: each arm comes after every other one."""
    first = number // 2 % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if number % 2 else order


def clocked(function: Callable[[], object], prepare: Callable[[], object] | None = None) -> Arm:
    """An arm that runs a function; what prepares it is outside the clock."""

    def arm() -> float:
        if prepare:
            prepare()
        began = perf_counter()
        function()
        return 1e3 * (perf_counter() - began)

    return arm


def spread(values: np.ndarray, digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = (f"{q:.{digits}f}" for q in np.percentile(values, [25, 50, 75]))
    return f"{middle} ({low} to {high})"
