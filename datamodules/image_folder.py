"""A folder of images as data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import track
from torch import Tensor

from lightning_diffusion.datamodules.base import (
    Batch,
    BatchDataset,
    InMemory,
    ResumableDataModule,
    to_unit_range,
)
from lightning_diffusion.datamodules.images import BrokenImageError, ImageFiles, list_images, read_image
from lightning_diffusion.datamodules.split import held_out as is_held_out
from lightning_diffusion.noise_level import per_sample
from lightning_diffusion.resume import RandomKey, run_seed

MEMORY_LIMIT = 2**30  # bytes of pixels that are kept in memory without being asked
NONE_WHOLE = "found no whole image among the files, expected at least one."

_T = TypeVar("_T")


class OnDisk(BatchDataset):
    """Images decoded when they are asked for, in the loader's workers.

    With `skip_broken`, the next whole file takes the place of a broken one, with its own label.
    """

    def __init__(
        self, files: ImageFiles, size: tuple[int, int], channels: int, labels: bool, skip_broken: bool
    ) -> None:
        self.files, self.size, self.channels = files, size, channels
        self.labels, self.skip_broken = labels, skip_broken

    def __len__(self) -> int:
        return len(self.files.paths)

    def read(self, index: int) -> Tensor:
        """One image, uint8 (C, H, W)."""
        return read_image(self.files.paths[index], self.size, self.channels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images, labels = zip(*(self._whole(index) for index in indices), strict=True)
        batch = {"image": to_unit_range(torch.stack(images))}
        return {**batch, "label": torch.tensor(labels)} if self.labels else batch

    def _whole(self, index: int) -> tuple[Tensor, int]:
        for attempt in range(len(self)):
            chosen = (index + attempt) % len(self)
            try:
                return self.read(chosen), self.files.labels[chosen]
            except BrokenImageError as error:
                self.refuse(error)
        raise BrokenImageError(NONE_WHOLE)

    def refuse(self, error: BrokenImageError) -> None:
        """Raise, or only warn."""
        if not self.skip_broken:
            raise error
        warnings.warn(f"Left out: {error}", stacklevel=3)


def load(data: OnDisk) -> InMemory:
    """Decode all files, by threads, with a progress bar; broken ones are left out or refused."""
    images = torch.empty(len(data), data.channels, *data.size, dtype=torch.uint8)

    def read(index: int) -> BrokenImageError | None:
        try:
            images[index] = data.read(index)
        except BrokenImageError as error:
            return error
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = list(_track(pool.map(read, range(len(data))), len(data)))
    return _whole_ones(data, images, errors)


def _track(results: Iterable[_T], count: int) -> Iterable[_T]:
    return track(results, "Reading images", count, transient=True, disable=count < 500)


def _whole_ones(data: OnDisk, images: Tensor, errors: Sequence[BrokenImageError | None]) -> InMemory:
    for error in errors:
        if error is not None:
            data.refuse(error)
    whole = torch.tensor([error is None for error in errors])
    if not whole.any():
        raise BrokenImageError(NONE_WHOLE)
    labels = torch.tensor(data.files.labels)[whole] if data.labels else None
    return InMemory(images if whole.all() else images[whole], labels)


class ImageFolderDataModule(ResumableDataModule):
    """A folder of images, or of one sub-folder per class; scaled to cover the size, cropped about the centre.

    Sideways photographs are turned upright, transparent parts become white, 16-bit grey becomes 8-bit.

    Args:
        folder: of the images; sub-folders in sorted order are classes 0, 1, ...
        image_size: height and width, or one number for both.
        batch_size: images per process and micro-batch.
        channels: 3 for colour, 1 for grey.
        flip: mirror half of the training images, other ones in every epoch.
        held_out: share of each class never trained on, always the same images; or a folder of its own.
        labels: whether batches hold labels, where there are classes.
        skip_broken: leave out files that are no whole images, with a warning each, instead of stopping.
        in_memory: keep all pixels in memory; by default where they need at most 1 GiB.
        num_workers: processes that decode images; by default 0 in memory, else one per core, at most 8.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int | tuple[int, int],
        batch_size: int = 64,
        channels: int = 3,
        flip: bool = False,
        held_out: float | str | Path = 0.05,
        labels: bool = True,
        skip_broken: bool = False,
        in_memory: bool | None = None,
        num_workers: int | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"found channels={channels}, expected 3 for colour or 1 for grey.")
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        parts = split(list_images(Path(folder)), held_out)
        self.classes = parts[0].classes if labels else []
        self.training, self.held_out = (
            OnDisk(part, size, channels, bool(self.classes), skip_broken) for part in parts
        )
        pixels = (len(self.training) + len(self.held_out)) * channels * size[0] * size[1]
        self.in_memory = pixels <= MEMORY_LIMIT if in_memory is None else in_memory
        self.flip = flip
        workers = 0 if self.in_memory else min(os.cpu_count() or 1, 8)
        super().__init__(batch_size, workers if num_workers is None else num_workers)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return (self.training.channels, *self.training.size)

    def training_data(self) -> BatchDataset:
        return self._training

    def held_out_data(self) -> BatchDataset:
        return self._held_out

    @cached_property
    def _training(self) -> BatchDataset:
        return load(self.training) if self.in_memory else self.training

    @cached_property
    def _held_out(self) -> BatchDataset:
        return load(self.held_out) if self.in_memory and len(self.held_out) else self.held_out

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Mirror half of the training images, drawn for the global batch from (seed, epoch, micro-batch)."""
        return mirror_half(self, batch) if self.flip else batch


def mirror_half(data: ResumableDataModule, batch: Batch) -> Batch:
    """Mirror half of a batch's images while `data` is trained on, drawn for the global batch by its place."""
    if not (data.trainer and data.trainer.training):
        return batch
    loop = data.trainer.fit_loop
    ranks, number = data.ranks(), loop.epoch_loop.batch_progress.current.ready
    key = RandomKey(run_seed(), data.trainer.current_epoch, number, 1, ranks.rank, ranks.num_replicas)
    return {**batch, "image": mirror(batch["image"], key.uniform("flip", len(batch["image"])) < 0.5)}


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images left to right."""
    chosen = per_sample(chosen.to(images.device, non_blocking=True), images)
    return torch.where(chosen, images.flip(-1), images)


def split(files: ImageFiles, held_out: float | str | Path) -> tuple[ImageFiles, ImageFiles]:
    """Training and held-out files: by a share of each class, or the latter from a folder of its own."""
    if isinstance(held_out, float | int):
        chosen = is_held_out(files.names(), files.labels, held_out)
        return files.where([not c for c in chosen]), files.where(chosen)
    others = list_images(Path(held_out))
    if others.classes != files.classes:
        raise ValueError(
            f"found classes {others.classes[:4]} in the held-out folder {str(held_out)!r}, expected those of "
            f"the training folder, {files.classes[:4]}: give both the same sub-folders."
        )
    return files, others
