"""Every picture, in one style.

images    float (N, C, H, W) in [-1, 1], C = 1 (grey) or 3 (red, green, blue)
pixels    uint8 (N, H, W, C), rounded to the nearest of 256 levels, what lies outside clipped
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def width_curve(widths: Sequence[float], values: Sequence[float], online: float, metric: str) -> Figure:
    """A metric over the width of the average, the best marked, beside the online weights'."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    best = min(range(len(widths)), key=values.__getitem__)
    axes.plot(widths, values, "o-", color="C0", label="average")
    axes.plot(widths[best], values[best], "o", color="C3", label=f"best: {widths[best]:.3g}")
    axes.axhline(online, color="0.5", linestyle="--", label="online weights")
    axes.set(xscale="log", xlabel="width of the average over the length of the training", ylabel=metric)
    ticks = [
        tick for tick in (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25) if widths[0] <= tick <= widths[-1]
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure
