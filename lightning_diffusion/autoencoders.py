"""Autoencoders: images to latents and back. What they return may take any of the forms in use.

encode  a tensor; a Gaussian with mean and std; diffusers' objects with latent_dist, latents or latent
decode  a tensor; diffusers' object with sample
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_diffusion.io import refuse_other_weights, tensors_hash
from lightning_diffusion.recording import Recorded

CHUNK = 64
"""Images that go through an autoencoder at once: a decoder needs far more memory per image than training does."""


class Posterior(NamedTuple):
    """Latents of images as a diagonal Gaussian, mean and std (B, C, H, W); std is None where nothing is random."""

    mean: Tensor
    std: Tensor | None = None

    def draw(self, generator: torch.Generator) -> Tensor:
        """Latents (B, C, H, W), one draw of each; `generator` lives on their device."""
        if self.std is None:
            return self.mean
        noise = torch.randn(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + self.std * noise

    def draw_each(self, seeds: Sequence[int]) -> Tensor:
        """Latents (B, C, H, W) on the CPU, each drawn by a seed of its own, whatever is beside it in the batch."""
        if self.std is None:
            return self.mean
        noise, generator = torch.empty_like(self.mean), torch.Generator()
        for own, seed in zip(noise, seeds, strict=True):
            own.normal_(generator=generator.manual_seed(seed))
        return self.mean + self.std * noise


class Autoencoder(Recorded, nn.Module, ABC):
    """Images (B, C, H, W) in [-1, 1] to latents and back. Any nn.Module with these two methods will do."""

    @abstractmethod
    def encode(self, images: Tensor) -> Any:
        """Latents of images (B, C, H, W), in one of the forms that this module lists."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Any:
        """Images (B, C, H, W) of latents."""

    @property
    def needs_measuring(self) -> bool:
        """Whether `measure` must see training images first."""
        return False

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Learn from training images (B, C, H, W) what coding needs; the same on all ranks."""


class PretrainedAutoencoder(Autoencoder):
    """An autoencoder with its parameters from a file.

    Args:
        autoencoder: the same architecture.
        weights: a .safetensors file of its state dict, such as diffusers' `diffusion_pytorch_model.safetensors` or
            the `autoencoder.safetensors` that `write_latents` leaves. It is read at once if it is there, else when
            it is needed, which it is not where a checkpoint holds the parameters.

    Raises:
        FileNotFoundError: when the file is needed and is not there.
        ValueError: if it is of another autoencoder.
    """

    def __init__(self, autoencoder: Autoencoder | nn.Module, weights: str) -> None:
        super().__init__()
        self.autoencoder, self.weights = autoencoder, weights
        self._is_read = False
        if Path(weights).is_file():
            self._read()

    @property
    def needs_measuring(self) -> bool:
        return not self._is_read

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Read the file, if it could not be read before; `batches` are not looked at."""
        if not self._is_read:
            self._read()

    def encode(self, images: Tensor) -> Any:
        self.measure([])
        return self.autoencoder.encode(images)  # type: ignore[operator]

    def decode(self, latents: Tensor) -> Any:
        self.measure([])
        return self.autoencoder.decode(latents)  # type: ignore[operator]

    def _read(self) -> None:
        if not Path(self.weights).is_file():
            raise FileNotFoundError(
                f"{self.weights} does not exist: give the .safetensors file of the autoencoder's parameters"
            )
        from safetensors.torch import load_file

        state = load_file(self.weights)
        refuse_other_weights(state, self.autoencoder.state_dict(), self.weights)
        self.autoencoder.load_state_dict(state)
        self._is_read = True

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        self._is_read = self._is_read or any(name.startswith(prefix) for name in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


class DiffusersAutoencoder(Autoencoder):
    """An autoencoder of diffusers: AutoencoderKL, AutoencoderTiny, VQModel, ...

    Args:
        folder: as `save_pretrained` wrote it, or a name on the hub; needed again where a checkpoint is loaded.
        subfolder: in it, such as "vae" in a pipeline.
    """

    def __init__(self, folder: str, subfolder: str | None = None) -> None:
        super().__init__()
        try:
            import diffusers
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "diffusers is not installed: run `pip install 'lightning-diffusion[diffusers]'`."
            ) from error
        config = diffusers.AutoencoderKL.load_config(folder, subfolder=subfolder)
        self.autoencoder = getattr(diffusers, config["_class_name"]).from_pretrained(
            folder, subfolder=subfolder
        )

    def encode(self, images: Tensor) -> Any:
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor) -> Any:
        return self.autoencoder.decode(latents)


def encode_images(autoencoder: nn.Module, images: Tensor) -> Posterior:
    """Latents of images (B, C, H, W), in float32 (float64 for those), without gradients, some images at a time.

    Raises:
        TypeError: for an autoencoder that returns something else than the forms that this module lists.
    """
    with torch.no_grad():
        parts = [_posterior(_run(autoencoder, "encode", part)) for part in images.split(CHUNK)]  # type: ignore[no-untyped-call]
    means, stds = zip(*parts, strict=True)
    mean = torch.cat(means).to(images.dtype)
    return Posterior(mean, None if stds[0] is None else torch.cat(stds).to(images.dtype))


def decode_latents(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] of latents, in float32 (float64 for those), some at a time."""
    parts = [_run(autoencoder, "decode", part) for part in latents.split(CHUNK)]  # type: ignore[no-untyped-call]
    images = [getattr(part, "sample", part) for part in parts]
    if not isinstance(images[0], Tensor):
        raise TypeError(
            f"Found {type(autoencoder).__name__}.decode to return {type(parts[0]).__name__}; expected images as a "
            "tensor, or an object that has them as `sample`."
        )
    return torch.cat(images).to(latents.dtype).clamp(-1, 1)


def fingerprint(autoencoder: nn.Module) -> str:
    """A hash of the values of all parameters and buffers: 32 hexadecimal digits."""
    if isinstance(autoencoder, PretrainedAutoencoder):
        return fingerprint(autoencoder.autoencoder)
    return tensors_hash(autoencoder.state_dict())


def _run(autoencoder: nn.Module, method: str, x: Tensor) -> Any:
    """In the precision of the autoencoder's own parameters, whatever the Trainer's is."""
    own = chain(autoencoder.parameters(), autoencoder.buffers())
    dtype = next((p.dtype for p in own if p.is_floating_point()), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return getattr(autoencoder, method)(x.to(dtype))


def _posterior(encoded: Any) -> Posterior:
    for name in ("latent_dist", "latents", "latent"):
        encoded = getattr(encoded, name, encoded)
    if isinstance(encoded, Tensor):
        return Posterior(encoded)
    mean, std = (getattr(encoded, "mean", None), getattr(encoded, "std", getattr(encoded, "stddev", None)))
    if isinstance(mean, Tensor) and isinstance(std, Tensor):
        return Posterior(mean, std)
    raise TypeError(
        f"Found an autoencoder whose encode returns {type(encoded).__name__}; expected latents as a tensor, a Gaussian "
        "with tensors `mean` and `std`, or an object that has either as `latent_dist`, `latents` or `latent`."
    )
