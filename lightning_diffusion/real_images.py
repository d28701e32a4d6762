"""Real images as metrics take them: rounded to 8 bits, each training and held-out sample once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_diffusion.batches import LABEL, unpack
from lightning_diffusion.checks import check_images
from lightning_diffusion.chunk_order import sample_of_few_chunks
from lightning_diffusion.waiting import Waiting

MOST = 50_000
FEWEST = 10
_LISTED = 2**24  # of more samples, not all indices are written down


class Batch(NamedTuple):
    """Images uint8 (B, C, H, W), labels int64 (B,) or None."""

    images: Tensor
    labels: Tensor | None


def to_8_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded to the nearest of 256 levels; 8-bit images as they are.

    Raises:
        ValueError: for images that are not finite or lie outside, beyond rounding.
    """
    if images.dtype == torch.uint8:
        return images
    check_images(images)
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()


class RealImages:
    """The training and the held-out part of data, which can be gone through again and again.

    Args:
        training: a loader of the training data; of its dataset each sample is taken once, of more than 50,000 a fixed
            random choice; of data in chunks a choice out of 64 chunks, or as few more as hold 50,000.
        held_out: loaders of data that are never trained on.
        decode: from what batches hold to images in [-1, 1], for data kept as latents.
        shown: whether to show bars.

    Raises:
        ValueError: for fewer than 10 training images, or a dataset that cannot be indexed.
    """

    def __init__(
        self,
        training: Any,
        held_out: Iterable[Any] = (),
        decode: Callable[[Tensor], Tensor] | None = None,
        shown: bool = True,
    ) -> None:
        self._training, self._held_out = _every_sample(training), [_every_sample(one) for one in held_out]
        self._decode, self.shown = decode, shown
        self.num_training = _count(self._training)
        if self.num_training < FEWEST:
            raise ValueError(
                f"found {self.num_training} training images, expected {FEWEST} or more to compare samples with."
            )

    @property
    def num_held_out(self) -> int:
        """How many images are held out."""
        return sum(map(_count, self._held_out))

    def training(self) -> Iterator[Batch]:
        """Batches of the training part, in a fixed order."""
        return self._batches([self._training])

    def held_out(self) -> Iterator[Batch]:
        """Batches of the held-out part, in a fixed order."""
        return self._batches(self._held_out)

    @cached_property
    def content(self) -> Content:
        """One pass over everything: what these data are."""
        digest, labels = hashlib.blake2b(digest_size=16), []
        with Waiting(self.num_training + self.num_held_out, "real images", shown=self.shown) as waiting:
            for part in (self.training(), self.held_out()):
                digest.update(b"part")
                for batch in part:
                    _update(digest, batch)
                    labels += [batch.labels] if batch.labels is not None else []
                    waiting.advance(len(batch.images))
        labelled = sum(map(len, labels)) == self.num_training + self.num_held_out
        return Content(digest.hexdigest(), torch.cat(labels)[: self.num_training] if labelled else None)

    def _batches(self, loaders: Iterable[Any]) -> Iterator[Batch]:
        for loader in loaders:
            for raw in loader:
                x, condition = unpack(raw)
                label = condition.get(LABEL)
                images = x if self._decode is None else self._decode(x).clamp(-1, 1)
                yield Batch(to_8_bits(images).cpu(), None if label is None else label.cpu())


class Content(NamedTuple):
    """What data are: a hash of every pixel and label, and the labels of the training part (N,), if all have one."""

    digest: str
    labels: Tensor | None


def _update(digest: Any, batch: Batch) -> None:
    """Each image by itself, so that the hash does not depend on how they are batched."""
    shape = repr(tuple(batch.images.shape[1:])).encode()
    labels = [None] * len(batch.images) if batch.labels is None else batch.labels.tolist()
    for image, label in zip(batch.images.contiguous(), labels, strict=True):
        digest.update(shape + repr(label).encode() + image.numpy().tobytes())


def _every_sample(loader: Any) -> Any:
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset):
        raise ValueError(
            f"found a loader of {type(dataset).__name__}, expected one of a dataset that can be indexed, to go through "
            "every real image once: give metrics a datamodule of such data."
        )
    return DataLoader(
        dataset,
        batch_size=loader.batch_size or 256,
        sampler=_chosen(dataset).tolist(),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        generator=torch.Generator().manual_seed(0),  # else iterating draws from the global one
    )


def _chosen(dataset: Any) -> Tensor:
    """Indices of all samples, or of a fixed random choice; of data in chunks one that few of them hold."""
    size = len(dataset)
    if size <= MOST:
        return torch.arange(size)
    sizes = getattr(dataset, "chunk_sizes", None)
    return _some_of(size, MOST) if sizes is None else sample_of_few_chunks(sizes, MOST)


def _some_of(size: int, number: int) -> Tensor:
    """`number` of so many, sorted; without a list of all where they are very many."""
    generator = torch.Generator().manual_seed(0)
    few = size <= max(_LISTED, 4 * number)
    drawn = torch.arange(size) if few else torch.randint(size, (2 * number,), generator=generator)
    candidates: Tensor = torch.unique(drawn)
    return candidates[torch.randperm(len(candidates), generator=generator)[:number]].sort().values


def _count(loader: Any) -> int:
    return len(loader.sampler)
