"""Is a batch what a diffusion model expects?

    images    floating point in [-1, 1]      shape (B, C, H, W)
    labels    int64, 0 to num_classes - 1    shape (B,)

Each check says what was found, what was expected and what to write instead. Comparing values waits for the
device: call `check_images` on the first batch of a loader and on logging steps, not in every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = 1e-2  # rounding in resizing, and in half precision, is no error


def check_images(
    images: Tensor,
    labels: Tensor | None = None,
    num_classes: int = 0,
    image_shape: Sequence[int] | None = None,
    value_range: tuple[float, float] | None = (-1.0, 1.0),
) -> None:
    """Refuse a batch that would train a wrong model.

    Args:
        images: shape (B, *image_shape).
        labels: shape (B,), None where there are none.
        num_classes: of the network, 0 if it takes no labels.
        image_shape: of one image as the network takes it; None leaves it open.
        value_range: where values must lie; None for data that are not images.

    Raises:
        ValueError: about the first thing that is wrong.
    """
    _check_shape(images, image_shape)
    _check_type(images)
    _check_finite(images)
    if value_range is not None:
        _check_range(images, *value_range)
    if labels is not None:
        _check_labels(labels, len(images), num_classes)


def check_encoded(x0: Tensor, image_shape: Sequence[int] | None) -> None:
    """Refuse what a representation puts out, (B, ...), if it has not the network's shape; costs no waiting."""
    if image_shape is not None and tuple(x0.shape[1:]) != tuple(image_shape):
        raise ValueError(
            f"found that the representation puts out shape {tuple(x0.shape[1:])}, expected the network's "
            f"{tuple(image_shape)}: give the network image_shape={list(x0.shape[1:])}."
        )


def _check_shape(images: Tensor, image_shape: Sequence[int] | None) -> None:
    if image_shape is not None and tuple(images.shape[1:]) != tuple(image_shape):
        raise ValueError(
            f"found images of shape {tuple(images.shape[1:])}, expected the network's {tuple(image_shape)} "
            "(channels, height, width): give the network the image_shape of the data, or resize the data."
        )


def _check_type(images: Tensor) -> None:
    if not images.is_floating_point():
        raise ValueError(
            f"found images of type {images.dtype}, expected torch.float32 in [-1, 1]: convert 8-bit images "
            "by `images.float() / 127.5 - 1`."
        )


def _check_finite(images: Tensor) -> None:
    broken = ~torch.isfinite(images).flatten(1).all(1)
    if broken.any():
        where = broken.nonzero().flatten().tolist()
        raise ValueError(
            f"found NaN or infinity in images {where[:8]} of the batch, expected finite numbers: look for "
            "damaged files or a division by zero in the preprocessing, and leave these images out."
        )


def _check_range(images: Tensor, low: float, high: float) -> None:
    least, greatest = images.amin().item(), images.amax().item()
    if least >= low - TOLERANCE and greatest <= high + TOLERANCE:
        return
    is_8_bit = least >= 0 and high < greatest <= 255
    remedy = "divide by 127.5 and subtract 1" if is_8_bit else "scale them linearly to that range"
    raise ValueError(f"found images in {least:.4g}..{greatest:.4g}, expected {low:g}..{high:g}: {remedy}.")


def _check_labels(labels: Tensor, batch: int, num_classes: int) -> None:
    if num_classes == 0:
        raise ValueError(
            "found labels in the batch, expected none, for the network has num_classes=0: give the network "
            "the num_classes of the data, or leave the labels out (our datamodules: labels=False)."
        )
    if labels.dtype != torch.int64 or labels.shape != (batch,):
        raise ValueError(
            f"found labels of type {labels.dtype} and shape {tuple(labels.shape)}, expected torch.int64 and "
            f"({batch},): write `labels.long().flatten()`, or `labels.argmax(1)` for one-hot labels."
        )
    least, greatest = int(labels.min()), int(labels.max())
    if least < 0 or greatest >= num_classes:
        raise ValueError(
            f"found labels {least}..{greatest}, expected 0..{num_classes - 1}, for the network has "
            f"num_classes={num_classes}: give it the num_classes of the data, or number the classes from 0."
        )
