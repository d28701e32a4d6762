"""scikit-learn's handwritten digits: 1,797 real images, 8 x 8 pixels, 17 grey levels; no download."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_diffusion.datamodules.base import InMemory, ResumableDataModule
from lightning_diffusion.datamodules.split import held_out

SIZES = (8, 16, 32)


class DigitsDataModule(ResumableDataModule):
    """Handwritten digits, grey levels 0..16 scaled to [-1, 1], in ten classes.

    Args:
        batch_size: images per process and micro-batch.
        image_size: 8, or enlarged (bilinear) to 16 or 32.
        held_out: share of each class that is never trained on, always the same images.
        labels: whether batches hold labels.
        num_workers: 0 is fastest for data in memory.
    """

    def __init__(
        self,
        batch_size: int = 64,
        image_size: int = 8,
        held_out: float = 0.15,
        labels: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if image_size not in SIZES:
            raise ValueError(
                f"found image_size={image_size}, expected 8, 16 or 32: the digits have 8 x 8 pixels."
            )
        self.image_size = image_size
        self.held_out = held_out
        self.labels = labels

    @property
    def num_classes(self) -> int:
        return 10 if self.labels else 0

    @property
    def image_shape(self) -> tuple[int, ...]:
        return (1, self.image_size, self.image_size)

    def training_data(self) -> InMemory:
        return self._part(held_out=False)

    def held_out_data(self) -> InMemory:
        return self._part(held_out=True)

    def _part(self, held_out: bool) -> InMemory:
        images, labels, is_held_out = load_digits(self.held_out)
        chosen = is_held_out == held_out
        images = enlarge(images[chosen], self.image_size)
        return InMemory(images, labels[chosen] if self.labels else None)


def load_digits(fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """All digits: images (1797, 1, 8, 8) in [-1, 1], labels (1797,), which are held out (1797,)."""
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The digits come with scikit-learn, which is not installed: run "
            "`pip install 'lightning-diffusion[digits]'`."
        ) from error
    digits = load()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    names = [str(index) for index in range(len(labels))]
    return images, labels, torch.tensor(held_out(names, labels.tolist(), fraction))


def enlarge(images: Tensor, size: int) -> Tensor:
    """Bilinear, which keeps values in their range."""
    return images if images.shape[-1] == size else interpolate(images, (size, size), mode="bilinear")
