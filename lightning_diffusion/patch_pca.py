"""An autoencoder that needs no training: principal components of patches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_diffusion.autoencoders import Autoencoder
from lightning_diffusion.representation import sum_over_ranks


class PatchPCA(Autoencoder):
    """Principal components of square patches, measured on the training images: linear, with orthonormal rows.

    An image (C, H, W) becomes (channels, H / patch_size, W / patch_size). With channels = C patch_size^2 it is a
    rotation and loses nothing; with fewer, no linear code of patches loses less.

    Args:
        channels: components kept, those of largest variance.
        patch_size: pixels, in height and width.
        image_channels: C.
        num_images: how many training images are measured at most.

    Raises:
        ValueError: for more components than a patch has numbers.
    """

    mean: Tensor
    basis: Tensor

    def __init__(
        self, channels: int = 4, patch_size: int = 2, image_channels: int = 1, num_images: int = 10_000
    ) -> None:
        super().__init__()
        numbers = image_channels * patch_size**2
        if not 1 <= channels <= numbers:
            raise ValueError(
                f"Found channels={channels}; expected 1 to {numbers}, the numbers in a patch of "
                f"{image_channels} x {patch_size} x {patch_size}."
            )
        self.channels, self.patch_size, self.num_images = channels, patch_size, num_images
        self.register_buffer("mean", torch.full((numbers,), torch.nan))
        self.register_buffer("basis", torch.full((channels, numbers), torch.nan))

    @property
    def needs_measuring(self) -> bool:
        return bool(self.basis.isnan().any())

    def encode(self, images: Tensor) -> Tensor:
        patches = self._patches(images) - self.mean.view(-1, 1, 1)
        return torch.einsum("kd,bdhw->bkhw", self.basis, patches)

    def decode(self, latents: Tensor) -> Tensor:
        patches = torch.einsum("kd,bkhw->bdhw", self.basis, latents) + self.mean.view(-1, 1, 1)
        return F.pixel_shuffle(patches, self.patch_size)

    def measure(self, batches: Iterable[Tensor]) -> None:
        numbers, images = self.mean.numel(), 0
        sums = torch.zeros(numbers + 1, numbers + 1, dtype=torch.float64, device=self.mean.device)
        for batch in batches:
            patches = self._patches(batch.to(sums)).transpose(0, 1).flatten(1)
            patches = torch.cat([patches, torch.ones_like(patches[:1])])
            sums, images = sums + patches @ patches.T, images + len(batch)
            if images >= self.num_images:
                break
        self._set_components(sum_over_ranks(sums).cpu())

    def _set_components(self, sums: Tensor) -> None:
        """From the sum of [p, 1] [p, 1]^T over all patches p."""
        if not sums[-1, -1]:
            raise ValueError(
                "PatchPCA found no images to be measured on. Where latents are given directly, it has to be the one "
                "that made them: PretrainedAutoencoder(PatchPCA(...), 'FOLDER/autoencoder.safetensors')."
            )
        moments = sums / sums[-1, -1]
        mean = moments[-1, :-1]
        _, vectors = torch.linalg.eigh(moments[:-1, :-1] - mean.outer(mean))
        basis = vectors.T.flip(0)[: self.channels]
        sign = basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        self.mean.copy_(mean)
        self.basis.copy_(basis * sign)

    def _patches(self, images: Tensor) -> Tensor:
        (height, width), p = images.shape[-2:], self.patch_size
        if height % p or width % p:
            raise ValueError(
                f"Found images of {height} x {width} pixels; expected multiples of patch_size={p}. Resize them, or "
                "give PatchPCA another patch_size."
            )
        return F.pixel_unshuffle(images, p)
