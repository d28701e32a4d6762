"""Magnitudes layer by layer, beside what number formats can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_diffusion.analysis.number_formats import NumberFormat, number_format
from lightning_diffusion.analysis.operator_table import LOW
from lightning_diffusion.plots import PALETTE, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_diffusion.analysis.precision_report import OperatorRecord, PrecisionReport

MOST_LAYERS = 40


@dataclass(frozen=True)
class LayerMagnitude:
    """What a layer's operators put out: the typical (root mean square) and the largest magnitude, and whether low."""

    layer: str
    typical: float
    largest: float
    low: bool


def layer_magnitudes(records: Sequence[OperatorRecord], phase: str) -> list[LayerMagnitude]:
    """By module in the order of the forward, in a phase; deep ones are joined where there are too many."""
    modules = list(dict.fromkeys(r.module for r in records if r.module and r.phase == "forward"))
    layers = _joined(modules)
    found: dict[str, list[OperatorRecord]] = {layer: [] for layer in layers.values()}
    for r in records:
        if r.phase == phase and r.module in layers and r.largest:
            found[layers[r.module]].append(r)
    return [_magnitude(layer, of) for layer, of in found.items() if of]


def _joined(modules: Sequence[str]) -> Mapping[str, str]:
    depth = max((m.count(".") + 1 for m in modules), default=1)
    while depth > 1 and len({_cut(m, depth) for m in modules}) > MOST_LAYERS:
        depth -= 1
    return {m: _cut(m, depth) for m in modules}


def _cut(module: str, depth: int) -> str:
    return ".".join(module.split(".")[:depth])


def _magnitude(layer: str, records: Sequence[OperatorRecord]) -> LayerMagnitude:
    low = any(name in LOW for r in records for name in r.outputs)
    typical = math.exp(sum(math.log(r.root_mean_square) for r in records) / len(records))
    return LayerMagnitude(layer, typical, max(r.largest for r in records), low)


def magnitude_chart(report: PrecisionReport) -> Figure:
    """Two columns, forward and backward: a line from the typical to the largest magnitude for each layer."""
    from matplotlib.figure import Figure

    sides = {phase: layer_magnitudes(report.records, phase) for phase in ("forward", "backward")}
    layers = [m.layer for m in sides["forward"]]
    layers += [m.layer for m in sides["backward"] if m.layer not in layers]
    with style():
        figure = Figure(figsize=(8.0, 1.6 + 0.19 * max(len(layers), 4)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for panel, (phase, magnitudes), color in zip(axes, sides.items(), PALETTE, strict=False):
            _draw(panel, magnitudes, layers, color)
            panel.set(title=f"{phase}, {report.precision}", xlabel="magnitude")
        axes[0].set_yticks(range(len(layers)), layers, fontsize=7)
        axes[0].set_ylim(len(layers) - 0.4, -0.6)
    return figure


def _draw(axes: Axes, magnitudes: Sequence[LayerMagnitude], layers: Sequence[str], color: str) -> None:
    axes.set_xscale("log")
    for m in magnitudes:
        y, shade = layers.index(m.layer), color if m.low else "0.55"
        axes.plot([m.typical, m.largest], [y, y], color=shade, linewidth=1.4)
        axes.plot([m.largest], [y], "o", color=shade, markersize=3.5)
    float16 = number_format(LOW["float16"])
    lowest = min([m.typical for m in magnitudes], default=1.0)
    axes.set_xlim(min(float16.smallest_subnormal, lowest) / 10, float16.largest * 30)
    axes.set_xticks([10.0**k for k in range(-6, 4, 3)])
    _limits(axes, float16)


def _limits(axes: Axes, f: NumberFormat) -> None:
    """Where float16 ends; bfloat16 reaches as far as float32, beyond the picture."""
    for x, name in (
        (f.smallest_subnormal, "zero"),
        (f.smallest_normal, "subnormal"),
        (f.largest, "infinite"),
    ):
        axes.axvline(x, color=PALETTE[3], linewidth=1.0, linestyle="--")
        side = "left" if name == "infinite" else "right"
        axes.annotate(name, (x, 0.0), (2 if side == "left" else -2, 3), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha=side, fontsize=7, color=PALETTE[3])  # fmt: skip
