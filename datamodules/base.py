"""What our datamodules share: batches of one form, and a place in the data that survives stopping.

    {"image": float32 (B, C, H, W) in [-1, 1], "label": int64 (B,)}     label only where there are labels

A dataset gives a whole batch at once (`__getitems__`), so data in memory cost one gather per batch.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_diffusion.resume import Place, ResumableSampler, place_of, put_

Batch = dict[str, Tensor]


class BatchDataset(Dataset[Batch]):
    """A dataset that is asked for whole batches."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Batch: ...

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}


class InMemory(BatchDataset):
    """Images in memory, 8-bit or float in [-1, 1], shape (N, C, H, W), with labels (N,) or without."""

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        batch = {"image": to_unit_range(self.images[chosen])}
        return batch if self.labels is None else {**batch, "label": self.labels[chosen]}


def to_unit_range(images: Tensor) -> Tensor:
    """8-bit images to float32 in [-1, 1]; others as they are."""
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images


def _as_it_is(batch: Any) -> Any:
    return batch


class ResumableLoader(DataLoader[Batch]):
    """Tells Lightning that it resumes: the Trainer's loops keep the place, where the sampler starts.

    Without workers batches come straight from the dataset: a DataLoader's own way to them costs 0.1 ms each.
    """

    def __iter__(self) -> Any:
        return super().__iter__() if self.num_workers or self.pin_memory else self._batches()

    def _batches(self) -> Iterator[Batch]:
        for indices in self.batch_sampler or ():
            yield self.dataset.__getitems__(indices)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class Ranks(NamedTuple):
    """A process among those that train on different data."""

    num_replicas: int
    rank: int


class ResumableDataModule(LightningDataModule):
    """A datamodule whose run goes on, after any stop, with the very micro-batch that would have come next.

    Subclasses give `training_data()`, `held_out_data()`, `num_classes` and `image_shape`. When a run is
    resumed, the Trainer's loops are set to the first micro-batch of the accumulation window, whatever the
    LightningModule. The place is kept in samples of the global batch: a run with another batch size,
    accumulation or number of processes goes on there, or as little before as divides.

    Args:
        batch_size: images per process and micro-batch.
        num_workers: processes that load batches; 0 is fastest for data in memory.
    """

    sampler_class: type[ResumableSampler] = ResumableSampler

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"found batch_size={batch_size}, expected at least 1.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._place = Place(0, 0)

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""

    @abstractmethod
    def training_data(self) -> BatchDataset:
        """What is trained on."""

    @abstractmethod
    def held_out_data(self) -> BatchDataset:
        """What is never trained on."""

    def train_dataloader(self) -> ResumableLoader:
        data = self.training_data()
        if len(data) < self._global_batch():
            raise ValueError(
                f"found {len(data)} training images, expected at least the {self._global_batch()} of one "
                f"batch of {self.batch_size} on each of {self.ranks().num_replicas} processes: lower batch_size, or "
                "start fewer processes."
            )
        sampler = self.sampler_class(data, *self.ranks())
        self._start(sampler)
        return self._loader(data, sampler=sampler, drop_last=True)

    def _start(self, sampler: ResumableSampler) -> None:
        sampler.start_at(self._place.epoch, self._place.done * self.batch_size)

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        data = self.held_out_data()
        return self._loader(data) if len(data) else []

    def test_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        return self.val_dataloader()

    def predict_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        return self.val_dataloader()

    def _loader(self, data: BatchDataset, **options: Any) -> ResumableLoader:
        return ResumableLoader(
            data,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_as_it_is,
            generator=torch.Generator().manual_seed(0),  # else each iterator draws from the global one
            **options,
        )

    def ranks(self) -> Ranks:
        """Among how many processes the data are dealt out, and which of them this is."""
        kwargs = self.trainer and self.trainer.distributed_sampler_kwargs
        return Ranks(**kwargs) if kwargs else Ranks(1, 0)

    def _global_batch(self) -> int:
        return self.batch_size * self.ranks().num_replicas

    def state_dict(self) -> dict[str, int]:
        """Epoch, micro-batches of it that are done, down to an accumulation window, and samples in each."""
        if self.trainer is None:
            return {}
        place = place_of(self.trainer.fit_loop.state_dict(), self.trainer.accumulate_grad_batches)
        return {"epoch": place.epoch, "batches": place.done, "global_batch": self._global_batch()}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on at the place in the checkpoint being loaded, and set its loops, restored later, to it."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        saved = Place(state_dict["epoch"], state_dict["batches"])
        place = self._in_own_batches(saved, state_dict["global_batch"])
        self._place = place._replace(done=place.done - place.done % trainer.accumulate_grad_batches)
        loader = trainer.train_dataloader
        if isinstance(loader, ResumableLoader) and isinstance(loader.sampler, ResumableSampler):
            self._start(loader.sampler)  # strategies that shard load after the loader was made
        put_(trainer._checkpoint_connector._loaded_checkpoint["loops"]["fit_loop"], self._place)

    def _in_own_batches(self, place: Place, old_batch: int) -> Place:
        if old_batch == self._global_batch():
            return place
        place = rescale(place, old_batch, self._global_batch())
        whole_epoch = len(self.training_data()) // self._global_batch()
        return place if place.done < whole_epoch else Place(place.epoch + 1, 0)

    def teardown(self, stage: str) -> None:
        self._place = Place(0, 0)


def rescale(place: Place, old_batch: int, new_batch: int) -> Place:
    """The same place in batches of another size; where it does not divide, as little before as does."""
    samples = place.done * old_batch
    if samples % new_batch:
        warnings.warn(
            f"The run stopped after {samples} samples of epoch {place.epoch} in batches of {old_batch}: they "
            f"do not divide into batches of {new_batch}, and {samples % new_batch} are trained on again.",
            stacklevel=2,
        )
    return Place(place.epoch, samples // new_batch)
