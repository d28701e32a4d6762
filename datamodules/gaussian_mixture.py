"""A Gaussian mixture as data: samples never repeat, and the best denoiser is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_diffusion.analysis.information import GaussianMixture
from lightning_diffusion.datamodules.base import Batch, BatchDataset, ResumableDataModule
from lightning_diffusion.resume import RandomKey, StreamSampler, run_seed

BLOCK = 1024


class MixtureStream(BatchDataset):
    """Sample k of an endless stream is a function of (seed, purpose, k).

    Drawn in blocks of 1,024, of which the last is kept.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        size: int,
        shape: tuple[int, ...],
        labels: bool,
        key: RandomKey,
        purpose: str,
    ) -> None:
        self.mixture, self.size, self.shape, self.labels = mixture, size, shape, labels
        self.key, self.purpose = key, purpose
        self._kept: tuple[int, Batch] = (-1, {})

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        numbers, order = torch.as_tensor(indices).sort()
        blocks = numbers.div(BLOCK, rounding_mode="floor")
        parts = [self._choose(numbers[blocks == block], block) for block in sorted(set(blocks.tolist()))]
        return {name: torch.cat([part[name] for part in parts])[order.argsort()] for name in parts[0]}

    def _choose(self, number: Tensor, block: int) -> Batch:
        if self._kept[0] != block:
            self._kept = (block, self._draw(replace(self.key, batch=block).generator(self.purpose)))
        return {name: value[number % BLOCK] for name, value in self._kept[1].items()}

    def _draw(self, generator: torch.Generator) -> Batch:
        mixture = self.mixture
        component = torch.multinomial(mixture.weights, BLOCK, replacement=True, generator=generator)
        noise = torch.randn(BLOCK, mixture.dimensions, dtype=torch.float64, generator=generator)
        x = mixture.means[component] + mixture.stds[component, None] * noise
        batch = {"image": x.float().reshape(BLOCK, *self.shape)}
        return {**batch, "label": component} if self.labels else batch


class GaussianMixtureDataModule(ResumableDataModule):
    """Fresh samples of a Gaussian mixture in every epoch, and always the same held-out ones.

    They are not confined to [-1, 1]: give the module `representation=Identity(bounded=False)`.

    Args:
        mixture: in D dimensions.
        batch_size: samples per process and micro-batch.
        image_shape: of a sample, by default (D,).
        samples_per_epoch: how many samples make an epoch.
        held_out: number of samples to validate on.
        labels: whether the component comes as label.
        num_workers: 0 is fastest.
    """

    sampler_class = StreamSampler

    def __init__(
        self,
        mixture: GaussianMixture,
        batch_size: int = 256,
        image_shape: Sequence[int] | None = None,
        samples_per_epoch: int = 65_536,
        held_out: int = 4096,
        labels: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self._shape = (mixture.dimensions,) if image_shape is None else tuple(image_shape)
        if math.prod(self._shape) != mixture.dimensions:
            raise ValueError(
                f"found image_shape={self._shape}, of {math.prod(self._shape)} numbers, expected one of "
                f"{mixture.dimensions}, the dimensions of the mixture."
            )
        self.mixture, self.labels = mixture, labels
        self.samples_per_epoch, self.held_out = samples_per_epoch, held_out

    @property
    def num_classes(self) -> int:
        return len(self.mixture.weights) if self.labels else 0

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self._shape

    def training_data(self) -> MixtureStream:
        return self._stream(self.samples_per_epoch, run_seed(), "mixture")

    def held_out_data(self) -> MixtureStream:
        return self._stream(self.held_out, 0, "held-out mixture")

    def _stream(self, size: int, seed: int, purpose: str) -> MixtureStream:
        return MixtureStream(self.mixture, size, self._shape, self.labels, RandomKey(seed), purpose)
