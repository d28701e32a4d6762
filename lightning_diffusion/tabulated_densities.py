"""Densities given by numbers: what a weight becomes when it is turned into a density."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_diffusion.densities import Density, Truncated
from lightning_diffusion.schedules import DiscreteSchedule, Schedule
from lightning_diffusion.time_densities import TimeDensity

_LARGEST = 60.0  # a log-SNR beyond which nothing is tabulated
_KNOTS = 1025
_LEAST = -70.0  # logarithm of the smallest height kept, relative to the largest


@dataclass(frozen=True)
class TabulatedDensity(Density):
    """Log-density linear in log-SNR between knots, nothing outside of them; quantile and log_prob in closed form.

    Args:
        log_snr: knots, rising.
        log_height: log-density at the knots, up to a constant.

    Raises:
        ValueError: unless there are as many heights as knots, at least two, all finite, the knots rising.
    """

    log_snr: tuple[float, ...]
    log_height: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_snr", tuple(self.log_snr))
        object.__setattr__(self, "log_height", tuple(self.log_height))
        knots, heights = (torch.tensor(part).double() for part in (self.log_snr, self.log_height))
        if len(knots) < 2 or knots.shape != heights.shape:
            raise ValueError(
                f"Found {len(knots)} knots and {len(heights)} heights; expected as many, at least 2."
            )
        if not (knots.diff() > 0).all() or not torch.cat([knots, heights]).isfinite().all():
            raise ValueError("Found knots that do not rise, or numbers that are not finite; expected both.")

    def __repr__(self) -> str:
        return f"TabulatedDensity({len(self.log_snr)} knots from {self.log_snr[0]:.4g} to {self.log_snr[-1]:.4g})"

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        knots, log_height, slope, mass = (part.to(u.device, non_blocking=True) for part in self._pieces)
        below = mass.cumsum(0)
        target = (1 - u.to(mass)) * below[-1]
        k = torch.searchsorted(below[:-1].contiguous(), target, right=True)
        rest = (target - (below - mass)[k]) / log_height[k].exp()
        return (knots[k] + _inverse_growth(rest, slope[k])).clamp(knots[0], knots[-1])

    def log_prob(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        knots, log_height, slope, mass = (part.to(log_snr, non_blocking=True) for part in self._pieces)
        k = torch.searchsorted(knots[1:-1].contiguous(), log_snr.contiguous())
        log_prob = log_height[k] + slope[k] * (log_snr - knots[k]) - mass.sum().log()
        return log_prob.where((log_snr >= knots[0]) & (log_snr <= knots[-1]), -math.inf)

    @property
    def total(self) -> float:
        """The integral of the heights as they were given."""
        return float(self._pieces[3].sum()) * math.exp(max(self.log_height))

    @cached_property
    def _pieces(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Knots, log-heights (largest 0), slopes and masses of the pieces, float64."""
        knots = torch.tensor(self.log_snr, dtype=torch.float64)
        log_height = torch.tensor(self.log_height, dtype=torch.float64)
        log_height = log_height - log_height.max()
        slope = log_height.diff() / knots.diff()
        mass = log_height[:-1].exp() * _growth(knots.diff(), slope)
        return knots, log_height, slope, mass


@dataclass(frozen=True)
class TabulatedTime(TimeDensity):
    """Steps over time: t falls into each of equal parts of [0, 1] with a given share, uniformly within it.

    With as many parts as a table has entries these are the entries' shares.

    Args:
        shares: of the parts, up to a constant, from t = 0 on.
        schedule: that time belongs to; the objective's own if not given.

    Raises:
        ValueError: for shares below zero or of sum zero.
    """

    shares: tuple[float, ...]
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        if not self.shares or min(self.shares) < 0 or not 0 < sum(self.shares) < math.inf:
            raise ValueError(
                "Found shares below zero, none above, or infinite; expected shares of at least 0."
            )

    def __repr__(self) -> str:
        return f"TabulatedTime({len(self.shares)} parts)"

    def time_quantile(self, u: Tensor) -> Tensor:
        mass = self._mass.to(u.device, non_blocking=True)
        below = mass.cumsum(0)
        target = u.to(mass) * below[-1]
        k = torch.searchsorted(below[:-1].contiguous(), target, right=True)
        inside = (target - (below - mass)[k]) / mass[k].clamp(min=1e-300)
        return (k + inside.clamp(0, 1 - 1e-9)) / len(mass)

    def time_log_prob(self, t: Tensor) -> Tensor:
        mass = self._mass.to(t, non_blocking=True)
        k = (t * len(mass)).long().clamp(0, len(mass) - 1)
        return mass[k].log() + math.log(len(mass))

    @property
    def total(self) -> float:
        """The sum of the shares as they were given."""
        return sum(self.shares)

    @cached_property
    def _mass(self) -> Tensor:
        shares = torch.tensor(self.shares, dtype=torch.float64)
        return shares / shares.sum()


def tabulate(curve: Callable[[Tensor], Tensor], density: Density, schedule: Schedule) -> TabulatedDensity:
    """The density proportional to `curve`, (B,) to (B,), over the log-SNRs that another density draws."""
    least, most = support(density, schedule)
    knots = torch.linspace(least, most, _KNOTS, dtype=torch.float64)
    log_height = curve(knots).log()
    log_height = log_height.clamp(min=float(log_height.max()) + _LEAST)
    return TabulatedDensity(tuple(knots.tolist()), tuple(log_height.tolist()))


def tabulate_entries(
    weight: Callable[[Tensor], Tensor], density: Density, schedule: Schedule
) -> TabulatedTime | None:
    """The density over a table's entries with shares times `weight`, (B,) to (B,); None if draws are of no table."""
    inner = density
    while isinstance(inner, Truncated):
        inner = inner.density
    own = inner.schedule if isinstance(inner, TimeDensity) else None
    table = own or schedule
    if not isinstance(inner, TimeDensity) or not isinstance(table, DiscreteSchedule):
        return None
    entries = table.log_snrs
    above = density.share_above((entries[:-1] + entries[1:]) / 2, schedule)
    share = torch.cat([torch.zeros(1), above, torch.ones(1)]).double().diff()
    return TabulatedTime(tuple((share * weight(entries)).tolist()), own)


def support(density: Density, schedule: Schedule) -> tuple[float, float]:
    """The least and the largest log-SNR that are drawn, but for one draw in 1e12, and no further than +-60."""
    ends = torch.tensor([1 - 1e-12, 1e-12], dtype=torch.float64)
    least, most = density.quantile(ends, schedule).clamp(-_LARGEST, _LARGEST).tolist()
    return least, most


def integral(curve: Callable[[Tensor], Tensor], least: float, most: float) -> Tensor:
    """Of a curve, (B,) to (B,), between two log-SNRs, by the trapezoid rule on 2^14 intervals; shape ()."""
    at = torch.linspace(least, most, 2**14 + 1, dtype=torch.float64)
    return torch.trapezoid(curve(at), at)


def _growth(x: Tensor, slope: Tensor) -> Tensor:
    """The integral of exp(slope s) over s from 0 to x."""
    z = slope * x
    return x * (torch.expm1(z) / z).where(z.abs() > 1e-12, 1.0)


def _inverse_growth(area: Tensor, slope: Tensor) -> Tensor:
    """x with _growth(x, slope) = area."""
    z = slope * area
    return area * (torch.log1p(z.clamp(min=-1 + 1e-15)) / z).where(z.abs() > 1e-12, 1.0)
