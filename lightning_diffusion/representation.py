r"""Between the data space, images in [-1, 1], and the space that is trained on.

A representation puts out zero mean and the deviation `sigma_data` that the objective assumes: encode before the
loss, decode after sampling. Its buffers are saved with the model, so that a fresh process samples the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_diffusion.recording import Recorded
from lightning_diffusion.resume import RandomKey


class Representation(Recorded, nn.Module, ABC):
    """A map from images (B, C, H, W) in [-1, 1] to what is trained on, and back."""

    sigma_data: float | None = None
    """The deviation that `encode` puts out; None where it is not known."""

    bounded: bool = True
    """Whether the data lie in [-1, 1], as images do: batches are checked for it and samples cut to it."""

    keeps_shape: bool = True
    """Whether `encode` puts out the shape of its input, so that batches are checked for the network's."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to what is trained on."""

    def draw(self, images: Tensor, key: RandomKey) -> Tensor:
        """What is trained on: `encode`, or a draw where encoding is random, the same for the same key."""
        return self.encode(images)

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """What was sampled to images (B, C, H, W)."""

    def hold(self, x: Tensor) -> Tensor:
        """A guess of clean data moved to the nearest that can be (E[x_0 | x_t] is never outside); by default not."""
        return x

    @property
    def needs_measuring(self) -> bool:
        """Whether `measure` must see training images first."""
        return False

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Learn from training images (B, C, H, W) what `encode` needs; the same on all ranks."""


class Identity(Representation):
    """Train on the data as they are.

    Args:
        bounded: False for data that are not images in [-1, 1].
    """

    def __init__(self, bounded: bool = True) -> None:
        super().__init__()
        self.bounded = bounded

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x: Tensor) -> Tensor:
        return x

    def hold(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 1) if self.bounded else x


class Standardize(Representation):
    """Zero mean and deviation `sigma_data` in every channel.

    Args:
        mean, std: per channel; None measures them on the training images when the fit starts.
        sigma_data: the deviation to put out; give the objective the same.
        num_images: how many training images are measured at most.

    Raises:
        ValueError: if only one of mean and std is given, or a deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        sigma_data: float = 0.5,
        num_images: int = 10_000,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None) or (std is not None and min(std) <= 0):
            raise ValueError(
                f"Found mean={mean}, std={std}; expected both with std > 0, or neither to measure them."
            )
        self.sigma_data = self._deviation = sigma_data
        self.num_images = num_images
        self.register_buffer("mean", torch.tensor(mean if mean is not None else [torch.nan]))
        self.register_buffer("std", torch.tensor(std if std is not None else [torch.nan]))

    @property
    def needs_measuring(self) -> bool:
        return bool(self.std.isnan().any())

    def encode(self, images: Tensor) -> Tensor:
        return (images - per_channel(self.mean, images)) * per_channel(self._deviation / self.std, images)

    def decode(self, x: Tensor) -> Tensor:
        return x * per_channel(self.std / self._deviation, x) + per_channel(self.mean, x)

    def hold(self, x: Tensor) -> Tensor:
        return self.encode(self.decode(x).clamp(-1, 1)) if self.bounded else x

    def measure(self, batches: Iterable[Tensor]) -> None:
        self.mean, self.std = channel_moments(batches, self.num_images, self.std.device)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in ("mean", "std"):
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(saved, device=self.std.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def channel_moments(
    batches: Iterable[Tensor], num_images: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, (C,) float32, over batches (B, C, H, W) of all ranks until num_images are seen.

    Raises:
        ValueError: for a channel that is constant.
    """
    count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for images in batches:
        x = images.double().transpose(0, 1).flatten(1)
        count, total, squares = count + x.shape[1], total + x.sum(1), squares + x.square().sum(1)
        if count >= num_images * images[0, 0].numel():
            break
    sums = sum_over_ranks(torch.cat([torch.full_like(total, count), total, squares]).to(device))
    n, total, squares = sums.chunk(3)
    mean, std = total / n, (squares / n - (total / n) ** 2).clamp(min=0).sqrt()
    if not bool((std.float() > 0).all()):
        raise ValueError(
            f"Found training images of deviation {std.tolist()} per channel; expected all above 0. "
            "Constant channels cannot be standardised: drop them, or give mean and std."
        )
    return mean.float(), std.float()


def per_channel(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient (C,) of channels in a shape that multiplies x (B, C, ...)."""
    return coefficient.reshape(-1, *(1,) * (x.ndim - 2))


def sum_over_ranks(sums: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each of them."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums
