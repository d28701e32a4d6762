"""Drawn images into a file: the ending says of which kind; either the whole is there or nothing.

.png     a grid, a column per class where there are few
.npz     images float32 (N, C, H, W) in [-1, 1], labels int64 (N,)
FOLDER   000000-LABEL.png, ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Batches = Iterable[tuple[Tensor, Tensor]]

_MOST_COLUMNS = 20


def format_of(out: str) -> str:
    """png, npz or folder."""
    suffix = Path(out).suffix
    if out.endswith(("/", os.sep)) or not suffix or Path(out).is_dir():
        return "folder"
    if suffix not in (".png", ".npz"):
        raise ValueError(f"--out {out}: expected a name that ends in .png or .npz, or a folder (FOLDER/)")
    return suffix[1:]


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Nothing is overwritten unasked."""
    if not overwrite and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists: give another --out, or --overwrite")


def write_images(out: str, batches: Batches) -> str:
    """Write all batches; returns a line that says what is where."""
    writers: dict[str, Callable[[Path, Batches], str]] = {"png": _grid, "npz": _arrays, "folder": _single}
    return writers[format_of(out)](Path(out), batches)


def _grid(path: Path, batches: Batches) -> str:
    from lightning_diffusion.io import write_atomically
    from lightning_diffusion.plots import image_grid

    images, labels = _joined(batches)
    classes = len(set(labels.tolist()))
    picture = image_grid(images, columns=classes if 1 < classes <= _MOST_COLUMNS else None)
    write_atomically(path, partial(picture.save, format="png"))
    return f"{path}: a grid of {len(images)} images"


def _arrays(path: Path, batches: Batches) -> str:
    import numpy as np

    from lightning_diffusion.io import write_atomically

    images, labels = _joined(batches)
    arrays = {"images": images.float().numpy(), "labels": labels.numpy()}
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
    return f"{path}: images {tuple(images.shape)}, labels {tuple(labels.shape)}"


def _single(folder: Path, batches: Batches) -> str:
    from PIL import Image

    from lightning_diffusion.plots import to_pixels

    number = 0
    from lightning_diffusion.io import filled_folder

    with filled_folder(folder) as unfinished:
        for images, labels in batches:
            for pixels, label in zip(to_pixels(images), labels.tolist(), strict=True):
                Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
                    unfinished / f"{number:06d}-{label}.png"
                )
                number += 1
    return f"{folder}: {number} images"


def _joined(batches: Batches) -> tuple[Tensor, Tensor]:
    import torch

    images, labels = zip(*batches, strict=True)
    return torch.cat(images).cpu(), torch.cat(labels)
