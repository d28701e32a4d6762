"""A training over log-SNR and steps, in one picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_diffusion.level_records import LevelHistory, LevelRecord
from lightning_diffusion.level_statistics import LevelBins
from lightning_diffusion.plots import style

Array = NDArray[np.float64]

_LEAST = 8  # draws of a bin in a window: with fewer its mean says nothing
_UNKNOWN = "#D9D9D9"
_TITLES = {
    "linear": "loss over that of the best linear denoiser  (blue: better, red: worse)",
    "floor": "loss over the least possible  (white: nothing left to learn)",
}


class _Panel(NamedTuple):
    """Values (records, bins), NaN where they are not known, their colours, and a format for the scale."""

    title: str
    values: Array
    look: dict[str, Any]
    ticks: str | None = None


def noise_level_picture(history: LevelHistory, bins: LevelBins, references: Sequence[str]) -> Image.Image:
    """Loss over what is attainable (else the loss itself) and share of draws, log-SNR against step.

    Args:
        history: with at least one record.
        bins: of its records.
        references: names of what losses are compared with, `linear` and `floor`.
    """
    from matplotlib.figure import Figure

    panels = [*_losses(history, references), _shares(history)]
    with style():
        figure = Figure(figsize=(7.2, 0.6 + 2.2 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(rows, panels, strict=True):
            _draw(figure, axes, history, bins, panel)
        figure.supylabel("log-SNR  (noise below, data above)", fontsize="medium")
        rows[-1].set_xlabel("optimizer step")
    return _as_image(figure)


def _losses(history: LevelHistory, references: Sequence[str]) -> list[_Panel]:
    if not references:
        values = _series(history, lambda record: record.loss)
        return [_Panel("mean weighted loss", values, _logarithmic(values, "viridis"), "%.3g")]
    ratios = [_series(history, lambda record, i=i: record.over(i)) for i in range(len(references))]  # type: ignore[misc]
    return [
        _Panel(_TITLES[name], values, _around_one(values), "%.3g")
        for name, values in zip(references, ratios, strict=True)
    ]


def _shares(history: LevelHistory) -> _Panel:
    look = {"cmap": "Greys", "vmin": 0.0}
    return _Panel("share of draws (%)", 100 * _series(history, lambda record: record.share, 1), look)


def _series(history: LevelHistory, of: Callable[[LevelRecord], Tensor], least: int = _LEAST) -> Array:
    rows = [of(record).where(record.counts >= least, float("nan")).numpy() for record in history.records]
    return np.stack(rows)


def _around_one(values: Array) -> dict[str, Any]:
    """Colours that are equally strong at r and 1 / r, up to a factor of at most 10; outliers are cut."""
    from matplotlib.colors import LogNorm

    known = np.abs(np.log(values[values > 0]))
    reach = np.exp(np.clip(np.quantile(known, 0.98) if len(known) else 0.0, np.log(1.5), np.log(10)))
    return {"cmap": "RdBu_r", "norm": LogNorm(1 / reach, reach)}


def _logarithmic(values: Array, colours: str) -> dict[str, Any]:
    from matplotlib.colors import LogNorm

    known = values[values > 0]
    low, high = np.quantile(known, [0.02, 0.98]) if len(known) else (0.5, 2.0)
    return {"cmap": colours, "norm": LogNorm(low, max(high, 1.1 * low))}


def _draw(figure: Any, axes: Any, history: LevelHistory, bins: LevelBins, panel: _Panel) -> None:
    steps = [history.steps[0][0], *(last for _, last in history.steps)]
    edges, seen = _rows(history, bins)
    values = np.ma.masked_invalid(panel.values.T[seen])
    mesh = axes.pcolormesh(steps, edges, values, **panel.look)
    axes.set(title=panel.title, facecolor=_UNKNOWN)
    axes.grid(visible=False)
    _scale(figure, axes, mesh, panel)


def _rows(history: LevelHistory, bins: LevelBins) -> tuple[Array, slice]:
    """Edges of the bins from the first to the last that was ever seen; open bins are drawn as wide as the others."""
    inner = bins.edges.numpy()
    edges = np.array([2 * inner[0] - inner[1], *inner, 2 * inner[-1] - inner[-2]])
    most = np.max([record.counts.numpy() for record in history.records], axis=0)
    (known,) = np.nonzero(most >= min(_LEAST, most.max()))
    seen = slice(known[0], known[-1] + 1)
    return edges[known[0] : known[-1] + 2], seen


def _scale(figure: Any, axes: Any, mesh: Any, panel: _Panel) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=14)
    bar.outline.set_visible(False)
    if panel.ticks:
        bar.locator = LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
        bar.formatter = FormatStrFormatter(panel.ticks)
        bar.update_ticks()
        bar.ax.yaxis.set_minor_locator(NullLocator())


def _as_image(figure: Any) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")
