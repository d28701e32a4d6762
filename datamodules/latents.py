"""Latents that were computed once and are kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_diffusion.autoencoders import Posterior
from lightning_diffusion.datamodules.base import Batch, BatchDataset, ResumableDataModule, ResumableLoader
from lightning_diffusion.latent import LatentRepresentation
from lightning_diffusion.latent_shards import Shard, list_shards
from lightning_diffusion.resume import ResumableSampler, hash_seed, run_seed


class NumberedSampler(ResumableSampler):
    """Adds e n to the indices of epoch e of n samples, so that a dataset can draw others in every epoch."""

    def order(self, epoch: int) -> Tensor:
        """The numbers of an epoch, in order, for all processes, shape (len(dataset),)."""
        within = super().order(epoch)
        return within + epoch * len(within)


class LatentShards(BatchDataset):
    """Samples of memory-mapped shards; number e n + i is sample i of n, drawn from its posterior in epoch e.

    A draw is a function of (seed, number).

    Args:
        shards: of one part.
        seed: of the draws; None: no draws, the means.
        labels: whether batches hold labels.
    """

    def __init__(self, shards: Sequence[Shard], seed: int | None, labels: bool) -> None:
        self.shards, self.seed, self.labels = list(shards), seed, labels
        self.ends = torch.tensor(list(accumulate(shard.size for shard in shards)), dtype=torch.int64)

    def __len__(self) -> int:
        return sum(shard.size for shard in self.shards)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = self._rows(torch.as_tensor(indices) % len(self))
        posterior = Posterior(rows["mean"], None if self.seed is None else rows.get("std"))
        seeds = [hash_seed(self.seed, "latents", int(index)) for index in indices]
        batch = {"image": posterior.draw_each(seeds)}
        return {**batch, "label": rows["label"]} if self.labels else batch

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tensors"}

    @cached_property
    def _tensors(self) -> list[dict[str, Tensor]]:
        return [shard.tensors() for shard in self.shards]

    def _rows(self, index: Tensor) -> dict[str, Tensor]:
        """The samples at `index` (B,), in that order."""
        index, order = index.sort()
        owner = torch.searchsorted(self.ends, index, right=True)
        parts = [self._rows_of(shard, index[owner == shard]) for shard in sorted(set(owner.tolist()))]
        back = order.argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def _rows_of(self, shard: int, index: Tensor) -> dict[str, Tensor]:
        local = index - (self.ends[shard] - self.shards[shard].size)
        return {name: tensor[local] for name, tensor in self._tensors[shard].items()}


class LatentsDataModule(ResumableDataModule):
    """Latents that `write_latents` or `lightning-diffusion prepare latents` wrote, memory-mapped.

    Train on them with `LatentRepresentation(..., encoded=True)` and the autoencoder that made them; another is refused.

    Args:
        folder: of the shards.
        batch_size: latents per process and micro-batch.
        labels: whether batches hold labels, where there are any.
        sample: draw from each latent's posterior, anew in every epoch, where it is random; False: its mean.
        num_workers: 0 is fastest where the latents fit into memory.

    Raises:
        FileNotFoundError: no such folder, or no latents in it.
        ValueError: for truncated, mixed or missing shards, by name.
    """

    sampler_class = NumberedSampler

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 64,
        labels: bool = True,
        sample: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.shards = list_shards(folder)
        self.writing = self.shards[0].writing
        self.labels, self.sample = labels and self.writing.num_classes > 0, sample

    @property
    def num_classes(self) -> int:
        return self.writing.num_classes if self.labels else 0

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shards[0].shape

    def training_data(self) -> LatentShards:
        return self._part("training", run_seed())

    def held_out_data(self) -> LatentShards:
        return self._part("held_out", 0)

    def _part(self, part: str, seed: int) -> LatentShards:
        shards = [shard for shard in self.shards if shard.part == part]
        return LatentShards(shards, seed if self.sample else None, self.labels)

    def _loader(self, data: BatchDataset, **options: Any) -> ResumableLoader:
        refuse_other_representation(self.trainer, self.writing.autoencoder, self.shards[0].path.parent)
        return super()._loader(data, **options)


def refuse_other_representation(trainer: Any, made_by: str, folder: str | Path) -> None:
    """Refuse a module that would encode latents, or whose autoencoder has not the fingerprint `made_by`.

    Late, as a loader is made: the autoencoder has its parameters by then, from a file or a checkpoint.
    """
    representation = getattr(trainer and trainer.lightning_module, "representation", None)
    if not isinstance(representation, LatentRepresentation):
        return
    if not representation.encoded:
        raise ValueError(
            "The batches are latents already, but LatentRepresentation would encode them as images: set "
            "representation.init_args.encoded: true."
        )
    if representation.fingerprint != made_by:
        raise ValueError(
            f"The latents in {folder} were made by an autoencoder whose parameters hash to {made_by}; those of the "
            f"representation hash to {representation.fingerprint}. Give it the one in autoencoder.safetensors there, "
            "or write the latents again."
        )
