"""Every picture, in one style.

images    float (N, C, H, W) in [-1, 1], C = 1 (grey) or 3 (red, green, blue)
pixels    uint8 (N, H, W, C), rounded to the nearest of 256 levels, what lies outside clipped
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

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
