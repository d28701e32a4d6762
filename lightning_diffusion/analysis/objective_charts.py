"""What an objective trains on, over log-SNR: its effective weight beside others', and what there is to learn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_diffusion.analysis.shipped_objectives import shipped_objectives
from lightning_diffusion.analysis.trained_levels import TrainedLevels, gain_at
from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.objective import DiffusionObjective
from lightning_diffusion.plots import ink, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXIS = torch.linspace(-14, 14, 561, dtype=torch.float64)  # log-SNR + 2 ln sigma_data
_OTHERS = ("DDPM", "flow", "EDM", "min-SNR")


def weight_chart(levels: TrainedLevels, sampled: NoiseLevel) -> Figure:
    """Two panels over one axis: effective weights of unit area, and the share of the residual that can be explained."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(6.8, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        _weights(upper, levels.objective)
        _gain(lower, levels)
        _steps(lower, levels, sampled)
        lower.set_xlabel(r"log-SNR + 2 ln sigma_data   (noise left, clean images right)")
    return figure


def _weights(axes: Axes, objective: DiffusionObjective) -> None:
    for dashes, name in zip(("-", "--", ":", "-."), _OTHERS, strict=True):
        other = _curve(shipped_objectives()[name])
        axes.plot(_AXIS, other, label=name, color="0.55", linewidth=1.2, linestyle=dashes)
    own = _curve(objective)
    axes.plot(_AXIS, own, color=ink(0), linewidth=2.4, label="this configuration")
    axes.fill_between(_AXIS, own, color=ink(0), alpha=0.15, linewidth=0)
    axes.set(ylim=(0, None), xlim=(float(_AXIS[0]), float(_AXIS[-1])), title="Effective weight (area 1)")
    axes.legend(loc="upper left", fontsize=9)


def _curve(objective: DiffusionObjective) -> Tensor:
    omega = objective.effective_weight(_AXIS - 2 * math.log(objective.sigma_data)).double()
    omega = omega.nan_to_num(0, 0, 0)
    return omega / torch.trapezoid(omega, _AXIS).clamp(min=1e-30)


def _gain(axes: Axes, levels: TrainedLevels) -> None:
    at = _AXIS - 2 * math.log(levels.objective.sigma_data)
    axes.plot(_AXIS, gain_at(levels.data, at, levels.objective), color=ink(2), label="can be explained")
    axes.set(ylim=(-0.08, 1.02), title="Share of the residual that a linear denoiser explains on these data")


def _steps(axes: Axes, levels: TrainedLevels, sampled: NoiseLevel) -> None:
    """The sampler's steps as ticks along the bottom."""
    asked = sampled.log_snr[:-1] + 2 * math.log(levels.objective.sigma_data)
    inside = asked[asked.isfinite()].clamp(float(_AXIS[0]), float(_AXIS[-1]))
    axes.plot(inside, torch.full_like(inside, -0.04), "|", color=ink(1), markersize=7, clip_on=False)
    axes.annotate("the sampler's steps", (0.01, 0.12), xycoords="axes fraction", color=ink(1), fontsize=9)
