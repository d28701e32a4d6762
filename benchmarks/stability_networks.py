"""Networks at five sizes, with and without what is said to keep them stable, and their data: for stability.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_diffusion as ld
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.networks.magnitude_preserving import CosineAttention
from lightning_diffusion.networks.magnitudes import UnitWeight, mp_sum

SIZES = (1, 2, 3, 4, 5)
CHANNELS = (6, 10, 18, 30, 50)
DIT_SIZES = ((24, 2, 2), (32, 4, 2), (64, 3, 4), (96, 4, 4), (144, 5, 6))
DIT_OPTIONS = ("qk_norm", "rotary", "rms_norm", "swiglu")
TRAINED_ON, HELD_OUT = 2048, 128


@dataclass(frozen=True)
class Run:
    """One training: a row of the table.

    Args:
        images: side of the images in pixels, 8 or 32.
        network: unet, dit or magnitude_preserving.
        variant: what is switched on, joined by +; "plain" for nothing.
        size: 1 to 5, 64-fold in parameters.
        rate: learning rate after the warm-up.
        precision: bf16 or float32.
        seed: of weights, batches, levels and noise.
    """

    images: int
    network: str
    variant: str
    size: int
    rate: float
    precision: str = "bf16"
    seed: int = 1

    @property
    def steps(self) -> int:
        return {8: 100, 32: 40}[self.images]

    @property
    def batch(self) -> int:
        return {8: 16, 32: 8}[self.images]


@dataclass(frozen=True)
class LongRun(Run):
    """Long enough, at a usual rate, to see what the options are worth where nothing diverges."""

    @property
    def steps(self) -> int:
        return 600

    @property
    def batch(self) -> int:
        return 32


class FreeWeight(UnitWeight):
    """Without weight normalisation: neither forced nor in the graph."""

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = (self.weight * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class FreeAttention(CosineAttention):
    """Without normalised queries, keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3, self.heads, -1)).flatten(-2)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return mp_sum(x, self.proj(h), 0.3)


def freed(network: nn.Module, variant: str) -> nn.Module:
    """The magnitude-preserving network without what the variant leaves out."""
    free = {"weight_norm": (UnitWeight, FreeWeight), "qk_norm": (CosineAttention, FreeAttention)}
    for name, (own, other) in free.items():
        for part in network.modules():
            if name not in variant.split("+") and type(part) is own:
                part.__class__ = other
    return network


def network_of(run: Run) -> ld.Network:
    """The network of a run, with labels on the digits."""
    shape, classes = ((1, 8, 8), 10) if run.images == 8 else ((3, 32, 32), 0)
    if run.network == "dit":
        width, depth, heads = DIT_SIZES[run.size - 1]
        on = {name: name in run.variant.split("+") for name in DIT_OPTIONS}
        patch, size = (2 if run.images == 8 else 4), ld.DiTSize(width, depth, heads)
        return ld.DiT(shape, patch, size, classes, ld.DiTOptions(**on))
    channels, levels = CHANNELS[run.size - 1], (1, 2) if run.images == 8 else (1, 2, 2)
    attends = (len(levels) - 1,)
    if run.network == "unet":
        return ld.UNet(shape, channels, levels, 1, attends, classes)
    network = ld.MagnitudePreservingUNet(shape, channels, levels, 1, attends, classes, 2 * channels)
    freed(network, run.variant)
    return network


@cache
def data_of(images: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, held-out images and labels; mean 0 and deviation 0.5 per channel."""
    x, labels, y, held_out_labels = digits() if images == 8 else photographs(images)
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    x, y = ((part - mean) / deviation / 2 for part in (x, y))
    return x, labels, y[:HELD_OUT], held_out_labels[:HELD_OUT]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, rest = DigitsDataModule().training_data(), DigitsDataModule().held_out_data()
    assert train.labels is not None
    assert rest.labels is not None
    return train.images, train.labels, rest.images, rest.labels


def photographs(side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Crops of scikit-learn's two photographs, halved in size; the held-out ones from their right quarter."""
    from sklearn.datasets import load_sample_images

    pictures = [
        torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1 for image in load_sample_images().images
    ]
    pictures = [F.avg_pool2d(picture, 2)[0] for picture in pictures]
    border = 3 * pictures[0].shape[2] // 4
    generator = torch.Generator().manual_seed(0)
    x = crops([picture[:, :, :border] for picture in pictures], side, TRAINED_ON, generator)
    y = crops([picture[:, :, border:] for picture in pictures], side, HELD_OUT, generator)
    return x, torch.zeros(len(x), dtype=torch.int64), y, torch.zeros(len(y), dtype=torch.int64)


def crops(pictures: Sequence[Tensor], side: int, number: int, generator: torch.Generator) -> Tensor:
    """Squares from anywhere, the pictures in turn."""
    found = []
    for index in range(number):
        picture = pictures[index % len(pictures)]
        top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in picture.shape[1:])
        found.append(picture[:, top : top + side, left : left + side])
    return torch.stack(found)
