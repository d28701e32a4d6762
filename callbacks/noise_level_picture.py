"""A training over log-SNR and steps, in one picture."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_diffusion.level_statistics import LevelBins, LevelHistory, LevelRecord
from lightning_diffusion.plots import style

_LEAST = 8  # draws of a bin in a window: with fewer its mean says nothing


def noise_level_picture(history: LevelHistory, bins: LevelBins, references: list[str]) -> Image.Image:
    """Loss over what is attainable, gradient and share of draws, log-SNR against step.

    Args:
        history: with at least one record.
        bins: of its records.
        references: names of what losses are compared with.
    """
    from matplotlib.figure import Figure

    panels = _panels(history, references)
    with style():
        figure = Figure(figsize=(7.2, 0.6 + 2.3 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, values, look) in zip(rows, panels, strict=True):
            _heatmap(figure, axes, history, bins, values, look)
            axes.set(title=title, ylabel="log-SNR")
        rows[-1].set_xlabel("optimizer step")
    return _drawn(figure)


def _panels(
    history: LevelHistory, references: list[str]
) -> list[tuple[str, NDArray[np.float64], dict[str, Any]]]:
    ratios = {"linear": "loss over the best linear denoiser's", "floor": "loss over the least possible"}
    panels = []
    for number, name in enumerate(references):
        values = _series(history, lambda record, i=number: record.over(i))
        panels.append((ratios[name], values, _around_one(values)))
    if not references:
        values = _series(history, lambda record: record.loss)
        panels.append(("mean weighted loss", values, _logarithmic(values)))
    shares = _series(history, lambda record: record.share, least=1)
    panels.append(("share of draws", shares, {"cmap": "Greys", "vmin": 0.0}))
    return panels


def _series(history: LevelHistory, of: Any, least: int = _LEAST) -> NDArray[np.float64]:
    """(records, bins); NaN where there were too few draws."""
    rows = [_enough(record, of(record), least) for record in history.records]
    return np.stack(rows)


def _enough(record: LevelRecord, values: Any, least: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values.where(record.counts >= least, float("nan")).numpy()
    return found


def _around_one(values: NDArray[np.float64]) -> dict[str, Any]:
    from matplotlib.colors import LogNorm

    with np.errstate(all="ignore"):
        reach = np.nanmax(np.abs(np.log(values)), initial=np.log(1.5))
    reach = float(np.exp(min(reach, np.log(10))))
    return {"cmap": "RdBu_r", "norm": LogNorm(1 / reach, reach)}


def _logarithmic(values: NDArray[np.float64]) -> dict[str, Any]:
    from matplotlib.colors import LogNorm

    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
    return {"cmap": "viridis", "norm": LogNorm(low, max(high, 1.01 * low))}


def _heatmap(
    figure: Any,
    axes: Any,
    history: LevelHistory,
    bins: LevelBins,
    values: NDArray[np.float64],
    look: dict[str, Any],
) -> None:
    steps = np.array([history.steps[0][0], *(last for _, last in history.steps)], dtype=float)
    edges = bins.edges.numpy()
    width = edges[1] - edges[0]
    edges = np.array([edges[0] - width, *edges, edges[-1] + width])
    mesh = axes.pcolormesh(steps, edges, np.ma.masked_invalid(values.T), **look)
    axes.grid(visible=False)
    figure.colorbar(mesh, ax=axes, pad=0.01)


def _drawn(figure: Any) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")
