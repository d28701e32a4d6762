"""What the measurements of a denoiser share: clean data beside the denoiser that fits them, noise, and errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_diffusion.batches import unpack
from lightning_diffusion.noise_level import NoiseLevel, per_sample
from lightning_diffusion.objective import at_least_float32
from lightning_diffusion.resume import RandomKey
from lightning_diffusion.sampling import Denoiser

if TYPE_CHECKING:
    from lightning_diffusion.module import DiffusionModule

_BATCH = 256


class Units(NamedTuple):
    """x_0 = scale * image + shift, element by element; each broadcasts to one sample."""

    scale: Tensor
    shift: Tensor


class Measured(NamedTuple):
    """A batch x_0 (B, ...), float32 or float64, its denoiser, and its units, None where they mix elements."""

    denoiser: Denoiser
    x0: Tensor
    units: Units | None


def measured(denoiser: Denoiser, data: Tensor | Iterable[Any]) -> Iterator[Measured]:
    """From a tensor (N, ...), or batches as a loader yields them, their labels left out."""
    units = Units(torch.ones(()), torch.zeros(()))
    for part in torch.split(data, _BATCH) if isinstance(data, Tensor) else data:
        yield Measured(denoiser, at_least_float32(unpack(part)[0]), units)


def measured_module(
    module: DiffusionModule, batches: Iterable[Any], weights: str, seed: int
) -> Iterator[Measured]:
    """From what a loader yields: encoded as in training, each batch under its own labels."""
    device = next(module.parameters()).device
    for number, batch in enumerate(batches):
        images, condition = module._prepare("analysis", batch)
        images, condition = images.to(device), {name: part.to(device) for name, part in condition.items()}
        x0 = at_least_float32(module.representation.draw(images, RandomKey(seed, batch=number)))
        units = _units(module, images, x0)
        yield Measured(module.denoiser(condition, weights=weights), x0, units)


def peek(stream: Iterable[Measured]) -> tuple[Measured, Iterator[Measured]]:
    """The first batch, and the stream from its beginning.

    Raises:
        ValueError: if there is nothing in it.
    """
    iterator = iter(stream)
    first = next(iterator, None)
    if first is None:
        raise ValueError("Found no data; expected at least two samples.")
    return first, chain([first], iterator)


def draw_noise(x0: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, I) like x_0, drawn on the CPU and so the same on every device."""
    return torch.randn(x0.shape, dtype=x0.dtype, generator=generator).to(x0.device)


def noise_error(batch: Measured, noise: Tensor, level: NoiseLevel) -> Tensor:
    """|eps - eps_hat|^2 = SNR |x_0 - x_0_hat|^2 at a level (B,), float64 on the CPU, shape (B,)."""
    level = level.to(batch.x0)
    x0_hat = batch.denoiser(level.diffuse(batch.x0, noise), level)
    ratio = per_sample(level.alpha / level.sigma, noise)
    return power(ratio * (batch.x0 - x0_hat.to(batch.x0)))


def power(x: Tensor) -> Tensor:
    """|x|^2, float64 on the CPU, shape (B,)."""
    return x.double().flatten(1).square().sum(1).cpu()


def surplus(noise: Tensor) -> Tensor:
    """|eps|^2 - D, whose mean is 0: most of the chance in |eps - eps_hat|^2 where SNR is high, shape (B,)."""
    return power(noise) - noise[0].numel()


def generator(seed: int, number: int) -> torch.Generator:
    """Of batch `number`, the same in every process."""
    return RandomKey(seed, batch=number).generator("measured noise")


def _units(module: DiffusionModule, images: Tensor, x0: Tensor) -> Units | None:
    if images.shape != x0.shape:
        return None
    shift = module.representation.encode(torch.zeros_like(images[:1]))[0]
    scale = module.representation.encode(torch.ones_like(images[:1]))[0] - shift
    return Units(scale, shift) if torch.allclose(scale * images + shift, x0, atol=1e-4) else None
