"""Every picture, in one style.

images    float (N, C, H, W) in [-1, 1], C = 1 (grey) or 3 (red, green, blue)
pixels    uint8 (N, H, W, C), rounded to the nearest of 256 levels, what lies outside clipped
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart with every common kind of colour vision (Okabe & Ito 2008); without their yellow, pale on white."""

QUIET = "#C8C8C8"
"""Of lines that are there for comparison."""

_STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
_DARK: dict[Any, Any] = {
    **{f"{part}.facecolor": "#16181D" for part in ("figure", "axes", "savefig")},
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "#D6D9DE"),
    "axes.edgecolor": "#7A808A",
    "grid.color": "#30343C",
}
_BRIGHT = ("#58AEF0", "#FF8F57", "#42CFA0", "#E8A3CC", "#F2BE4A", "#9AD7F7", "#FFFFFF")
_is_dark = ContextVar("_is_dark", default=False)
_SEPARATOR = 1  # pixels
_GREY = 96  # of separators and of empty places, seen on black and on white
_READABLE = 48  # pixels: smaller images are enlarged by a whole factor to at least this


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Images in [-1, 1], (N, C, H, W), as uint8 (N, H, W, C)."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"Images have shape {tuple(images.shape)}, expected (N, 1, H, W) or (N, 3, H, W).")
    if images.isnan().any():
        raise ValueError(f"{int(images.isnan().flatten(1).any(1).sum())} of {len(images)} images hold NaN.")
    levels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).byte()
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def image_grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1], row by row, with thin separators.

    Args:
        columns: images per row; None: as many as there are rows, about.
        scale: whole factor of enlargement, nearest neighbour; None: small images to about 48 pixels.
    """
    pixels = to_pixels(images)
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    scale = scale or math.ceil(_READABLE / max(pixels.shape[1:3]))
    return _picture(_tile(pixels.repeat(scale, 1).repeat(scale, 2), columns))


def _tile(pixels: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    n, height, width, channels = pixels.shape
    step_y, step_x = height + _SEPARATOR, width + _SEPARATOR
    size = (-(-n // columns) * step_y + _SEPARATOR, columns * step_x + _SEPARATOR, channels)
    canvas = np.full(size, _GREY, dtype=np.uint8)
    for i, tile in enumerate(pixels):
        y, x = _SEPARATOR + i // columns * step_y, _SEPARATOR + i % columns * step_x
        canvas[y : y + height, x : x + width] = tile
    return canvas


def _picture(canvas: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(canvas[..., 0] if canvas.shape[-1] == 1 else canvas)


@contextmanager
def style() -> Iterator[None]:
    """The look of every chart, for what is drawn inside: 150 dots per inch, the colours of `PALETTE`.

    Light, but dark within `dark_paper`.
    """
    from matplotlib import rc_context
    from matplotlib.rcsetup import cycler

    paper = _DARK if _is_dark.get() else {}
    with rc_context(
        {**_STYLE, **paper, "axes.prop_cycle": cycler(color=_BRIGHT if _is_dark.get() else PALETTE)}
    ):
        yield


def ink(number: int) -> str:
    """Colour `number` of the palette, brighter on a dark page."""
    return (_BRIGHT if _is_dark.get() else PALETTE)[number]


@contextmanager
def dark_paper() -> Iterator[None]:
    """Charts that are drawn inside go on a dark page."""
    token = _is_dark.set(True)
    try:
        yield
    finally:
        _is_dark.reset(token)


def label_right(axes: Axes, lines: Sequence[Line2D], gap: float = 0.07) -> None:
    """Write each line's label beside its right end, in its colour; labels are `gap` of the height apart at least.

    The limits of the axes must be final.
    """
    ends = sorted(lines, key=lambda line: _end(axes, line))
    heights = _apart([_end(axes, line) for line in ends], gap)
    for line, height in zip(ends, heights, strict=True):
        axes.annotate(
            str(line.get_label()), (1, height), (6, 0), xycoords="axes fraction", textcoords="offset points",
            color=line.get_color(), va="center", annotation_clip=False,
        )  # fmt: skip


def _end(axes: Axes, line: Line2D) -> float:
    """Where a line leaves the axes, as a share of their height."""
    x, y = (np.asarray(part, dtype=float) for part in line.get_data())
    inside = np.isfinite(y) & (x <= axes.get_xlim()[1] + 1e-9)
    point = axes.transData.transform((x[inside][-1], y[inside][-1]))
    return float(np.clip(axes.transAxes.inverted().transform(point)[1], 0, 1))


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights moved as little as need be to be `gap` apart, within [0, 1] if they fit."""
    moved = list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    limit = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def width_curve(widths: Sequence[float], values: Sequence[float], online: float, metric: str) -> Figure:
    """A metric over the width of the average, the best marked, beside the online weights'."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
    best = min(range(len(widths)), key=values.__getitem__)
    axes.plot(widths, values, "o-", color=PALETTE[0], label="average")
    axes.plot(widths[best], values[best], "o", color=PALETTE[1], label=f"best: {widths[best]:.3g}")
    axes.axhline(online, color="0.5", linestyle="--", label="online weights")
    axes.set(xscale="log", xlabel="width of the average over the length of the training", ylabel=metric)
    ticks = [
        tick for tick in (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25) if widths[0] <= tick <= widths[-1]
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


class QualityPoint(NamedTuple):
    """A figure of merit of samples that took so many evaluations of the network each; a curve joins its points."""

    curve: str
    evaluations: int
    value: float


def quality_curves(points: Sequence[QualityPoint], title: str, quality: str = "Frechet distance") -> Figure:
    """Quality against the number of function evaluations, both on logarithmic axes."""
    from matplotlib.figure import Figure

    curves = list(dict.fromkeys(point.curve for point in points))
    with style():
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            own = sorted(point[1:] for point in points if point.curve == curve)
            dashes = "-" if number < len(PALETTE) else "--"
            axes.plot(*zip(*own, strict=True), "o", linestyle=dashes, label=curve)
        axes.set(xscale="log", yscale="log", xlabel="evaluations of the network per sample", ylabel=quality)
        axes.set_title(title)
        ticks = sorted({point.evaluations for point in points})
        axes.set_xticks(_spaced(ticks), [str(tick) for tick in _spaced(ticks)])
        axes.minorticks_off()
        plain_logarithmic(axes)
        figure.legend(loc="outside right upper", fontsize=9)
    return figure


def _spaced(ticks: Sequence[int]) -> list[int]:
    """Of rising numbers those a fifth above the last one taken, so that labels on a logarithmic axis do not overlap."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick > 1.2 * kept[-1]:
            kept.append(tick)
    return kept


def plain_logarithmic(axes: Axes) -> None:
    """Numbers as they are on a logarithmic y axis, powers of ten alone where it spans more than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    wide = high / low
    subs = (1, 1.5, 2, 3, 5, 7) if wide < 10 else (1, 2, 5) if wide < 300 else (1,)
    axes.yaxis.set_major_locator(LogLocator(10, subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
