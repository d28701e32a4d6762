"""Data in chunks, in a folder or a bucket, of any size: only what is being read is in memory, or on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_diffusion.autoencoders import Posterior
from lightning_diffusion.chunk_order import ChunkOrder
from lightning_diffusion.chunk_reading import ChunkCache, ChunkReader, read_prepared
from lightning_diffusion.chunks import Part, Prepared
from lightning_diffusion.datamodules.base import (
    Batch,
    BatchDataset,
    ResumableDataModule,
    ResumableLoader,
    to_unit_range,
)
from lightning_diffusion.datamodules.image_folder import mirror_half
from lightning_diffusion.datamodules.latents import refuse_other_representation
from lightning_diffusion.resume import ResumableSampler, hash_seed, run_seed


@dataclass(frozen=True)
class StreamingOptions:
    """How chunks are read; see `ChunkOrder` and `ChunkCache`.

    Args:
        streams: chunks that are mixed at least; best a multiple of the number of processes.
        window: samples of a stream that are shuffled together.
        flip: of pixels: mirror half of the training images, other ones in every epoch.
        sample: of latents: draw from each posterior anew in every epoch, where it is random; False: its mean.
        cache: of a bucket, on this machine.
    """

    streams: int = 64
    window: int = 4096
    flip: bool = False
    sample: bool = True
    cache: ChunkCache = field(default_factory=ChunkCache)


class ChunkedDataset(BatchDataset):
    """Samples of a part; number e n + i is sample i of n in epoch e, and what a latent's draw is a function of.

    Args:
        reader: of the part.
        prepared: what it holds.
        options: how it is read.
        seed: of the draws.
        labels: whether batches hold labels.
    """

    def __init__(
        self, reader: ChunkReader, prepared: Prepared, options: StreamingOptions, seed: int, labels: bool
    ) -> None:
        self.reader, self.prepared, self.options = reader, prepared, options
        self.seed, self.labels = seed, labels

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def chunk_sizes(self) -> Sequence[int]:
        """Samples of each chunk, in the order of their indices."""
        return self.reader.sizes

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        size = len(self)
        samples = self.reader.read([index % size for index in indices])
        image = self._drawn(samples, indices) if "mean" in samples else to_unit_range(samples["image"])
        self._check(image)
        return {"image": image, "label": samples["label"]} if self.labels else {"image": image}

    def _drawn(self, samples: Batch, indices: Sequence[int]) -> torch.Tensor:
        std = samples.get("std") if self.options.sample else None
        seeds = [hash_seed(self.seed, "latents", index) for index in indices]
        return Posterior(samples["mean"], std).draw_each(seeds)

    def _check(self, image: torch.Tensor) -> None:
        if tuple(image.shape[1:]) != self.prepared.shape:
            raise ValueError(
                f"Found samples of shape {tuple(image.shape[1:])} in {self.reader.folder}, expected the "
                f"{self.prepared.shape} of prepared.json: chunks of another folder were mixed in. Prepare it again."
            )


class ChunkSampler(ResumableSampler):
    """Deals a `ChunkedDataset` out in the order of `ChunkOrder`; adds e n to the indices of epoch e of n samples.

    The order is not kept in memory, and resuming costs nothing: places before the first are not computed.
    """

    dataset: ChunkedDataset

    def order(self, epoch: int) -> torch.Tensor:
        """All numbers of an epoch, in order, for all processes, shape (len(dataset),)."""
        return torch.tensor(list(self._numbers(epoch, 0, 1)))

    def __iter__(self) -> Iterator[int]:
        done = self.start.done if self.epoch == self.start.epoch else 0
        first = self.rank + done * self.num_replicas
        numbers = self._numbers(self.epoch, first, self.num_replicas)
        return (number for _, number in zip(range(self.num_samples - done), numbers, strict=False))

    def _numbers(self, epoch: int, first: int, step: int) -> Iterator[int]:
        options, size = self.dataset.options, len(self.dataset)
        sizes = self.dataset.reader.sizes
        order = ChunkOrder(sizes, options.streams, options.window, self.seed, epoch)
        return (epoch * size + index for index in order.indices(first, step))


class StreamingDataModule(ResumableDataModule):
    """Pixels or latents that `lightning-diffusion prepare` wrote, read from a folder or a bucket through litdata.

    Shuffled over chunks, windows and streams, dealt out to processes and workers, and resumed exactly, also with
    another batch size or number of processes or workers: the order is a function of (seed, epoch), the place the
    Trainer's.

    Args:
        folder: or address of a bucket: s3://..., gs://..., r2://..., azure://...
        batch_size: samples per process and micro-batch.
        labels: whether batches hold labels, where there are any.
        num_workers: processes that read.
        options: how chunks are mixed and kept.

    Raises:
        FileNotFoundError: if nothing was prepared there.
        ModuleNotFoundError: without litdata.
        ValueError: if files are missing or broken, naming one.
    """

    sampler_class = ChunkSampler

    def __init__(
        self,
        folder: str,
        batch_size: int = 64,
        labels: bool = True,
        num_workers: int = 2,
        options: StreamingOptions = StreamingOptions(),
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.folder, self.options = str(folder), options
        self.prepared = read_prepared(self.folder, options.cache)
        self.labels = labels and bool(self.prepared.classes)
        self._refuse_mirrored_latents()

    @property
    def num_classes(self) -> int:
        return len(self.prepared.classes) if self.labels else 0

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.prepared.shape

    def training_data(self) -> ChunkedDataset:
        return self._part("training", run_seed())

    def held_out_data(self) -> BatchDataset:
        return self._part("held_out", 0) if self.prepared.held_out else Nothing()

    def _part(self, part: Part, seed: int) -> ChunkedDataset:
        reader = ChunkReader(self.folder, part, self.options.cache)
        if len(reader) != getattr(self.prepared, part):
            raise ValueError(
                f"Found {len(reader)} samples in {reader.folder}, expected the {getattr(self.prepared, part)} of "
                "prepared.json: the folder was changed. Prepare the data again, into another one."
            )
        return ChunkedDataset(reader, self.prepared, self.options, seed, self.labels)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Mirror half of the training images, if asked."""
        return mirror_half(self, batch) if self.options.flip else batch

    def _loader(self, data: BatchDataset, **options: Any) -> ResumableLoader:
        if self.prepared.kind == "latents":
            refuse_other_representation(self.trainer, self.prepared.autoencoder, self.folder)
        return super()._loader(data, **options)

    def _refuse_mirrored_latents(self) -> None:
        if self.options.flip and self.prepared.kind == "latents":
            raise ValueError(
                f"Found flip=True for the latents in {self.folder}: the latents of a mirrored image are not those of "
                "the image mirrored. Set options.flip: false, or prepare a folder that holds mirrored images too."
            )


class Nothing(BatchDataset):
    """No samples."""

    def __len__(self) -> int:
        return 0

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        raise IndexError(f"found {len(indices)} indices into a dataset without samples, expected none.")
