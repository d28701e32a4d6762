"""Image files: which there are in a folder, and how one becomes 8-bit pixels (C, H, W)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
MODES = {1: "L", 3: "RGB"}
SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")


class BrokenImageError(ValueError):
    """A file that is no whole image."""


class ImageFiles(NamedTuple):
    """Files of a folder in sorted order, the class number of each (0 without classes), class names."""

    folder: Path
    paths: list[Path]
    labels: list[int]
    classes: list[str]

    def where(self, chosen: Sequence[bool]) -> ImageFiles:
        """The chosen files."""
        paths, labels = compress(self.paths, chosen), compress(self.labels, chosen)
        return self._replace(paths=list(paths), labels=list(labels))

    def names(self) -> list[str]:
        """Of each file, below the folder: they stay when it is moved."""
        return [path.relative_to(self.folder).as_posix() for path in self.paths]


def list_images(folder: Path) -> ImageFiles:
    """All images of a folder; where it has sub-folders with images, each of those is a class.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: images both beside and inside of the sub-folders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"found no folder {str(folder)!r}, expected one with images: check the path.")
    flat = sorted(path for path in folder.iterdir() if _is_image(path))
    groups = {sub.name: sorted(filter(_is_image, sub.rglob("*"))) for sub in sorted(_folders(folder))}
    groups = {name: paths for name, paths in groups.items() if paths}
    if flat and groups:
        raise ValueError(
            f"found images both in {str(folder)!r} and in its sub-folders {list(groups)[:4]}, expected "
            "either images or one sub-folder per class: move the images into a sub-folder, or the "
            "sub-folders elsewhere."
        )
    if not flat and not groups:
        raise FileNotFoundError(
            f"found no image in {str(folder)!r}, expected files ending in {', '.join(sorted(ENDINGS))}, in "
            "it or in one sub-folder per class: check the path."
        )
    labelled = [(path, label) for label, paths in enumerate(groups.values()) for path in paths]
    paths, labels = zip(*labelled or ((path, 0) for path in flat), strict=True)
    return ImageFiles(folder, list(paths), list(labels), list(groups))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file()


def _folders(folder: Path) -> Iterable[Path]:
    return (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_image(path: Path, size: tuple[int, int], channels: int) -> Tensor:
    """An image turned upright, scaled to cover (height, width) and cropped about its centre; uint8 (C, H, W).

    Raises:
        BrokenImageError: naming the file.
    """
    try:
        with Image.open(path) as opened:
            image = _flat(ImageOps.exif_transpose(opened)).convert(MODES[channels])
        fitted = ImageOps.fit(image, size[::-1], method=Image.Resampling.LANCZOS)
    except Exception as error:  # damaged data make Pillow raise nearly anything
        raise BrokenImageError(
            f"found a file that is no whole image: {str(path)!r} ({error}). Mend or remove it, or leave such "
            "files out by skip_broken=True."
        ) from error
    pixels = torch.from_numpy(np.array(fitted))
    return pixels.reshape(*size, channels).permute(2, 0, 1).contiguous()


def _flat(image: Image.Image) -> Image.Image:
    """8 bits and no transparency: 16-bit grey is scaled, transparent parts become white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown: save the file with 8 or 16 bits")
    if image.mode in SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode.lower().endswith("a") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image
