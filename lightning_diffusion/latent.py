"""Training on the latents of a frozen autoencoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_diffusion.autoencoders import (
    Autoencoder,
    Posterior,
    PretrainedAutoencoder,
    decode_latents,
    encode_images,
    fingerprint,
)
from lightning_diffusion.representation import Representation, channel_moments, per_channel
from lightning_diffusion.resume import RandomKey

AUTOENCODER, FINGERPRINT = "autoencoder.", "fingerprint"
NUM_IMAGES = 10_000  # that are measured at most


class LatentRepresentation(Representation):
    """Train on (latent - shift) * scale, per channel, of a frozen autoencoder (Rombach et al. 2022).

    The autoencoder is never trained or averaged, always in eval mode, and run outside of autocast. Where it encodes
    to a distribution, training sees a draw, the same for the same place in the run; `encode` gives the mean.

    Args:
        autoencoder: any nn.Module with `encode` and `decode`, frozen in place; see `autoencoders`.
        shift, scale: per channel, or one number for all; None measures them when the fit starts, so that latents have
            zero mean and the deviation sigma_data.
        sigma_data: that deviation, also of a given scale; give the objective the same.
        encoded: whether batches are latents already, as those of `LatentsDataModule`, and no images.
        save_autoencoder: keep its parameters in checkpoints; False keeps a hash, which another autoencoder is refused
            by. It then has to come with its parameters, as `PretrainedAutoencoder` does.

    Raises:
        TypeError: if the autoencoder has no `encode` or `decode`.
        ValueError: if only one of shift and scale is given, or a scale is 0.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        autoencoder: Autoencoder | nn.Module,
        shift: list[float] | float | None = None,
        scale: list[float] | float | None = None,
        sigma_data: float = 0.5,
        encoded: bool = False,
        save_autoencoder: bool = True,
    ) -> None:
        super().__init__()
        _check_methods(autoencoder)
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.sigma_data = self._deviation = sigma_data
        self.encoded, self.save_autoencoder = encoded, save_autoencoder
        self.bounded, self.keeps_shape = not encoded, encoded
        self._fingerprint: str | None = None
        self.register_buffer("shift", _numbers(shift))
        self.register_buffer("scale", _numbers(scale))
        if bool(self.shift.isnan().any() != self.scale.isnan().any()) or bool((self.scale == 0).any()):
            raise ValueError(
                f"Found shift={shift}, scale={scale}; expected both with scale != 0, or neither to measure them. For "
                "a published scaling factor alone, shift is 0.0, and sigma_data the deviation that comes out, often 1."
            )

    @property
    def fingerprint(self) -> str:
        """A hash of the autoencoder's parameters."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.autoencoder)
        return self._fingerprint

    @property
    def needs_measuring(self) -> bool:
        return self._autoencoder_needs_measuring or bool(self.scale.isnan().any())

    def train(self, mode: bool = True) -> LatentRepresentation:
        """The autoencoder stays in eval mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def encode(self, images: Tensor) -> Tensor:
        return self._scaled(self.posterior(images).mean)

    def draw(self, images: Tensor, key: RandomKey) -> Tensor:
        return self._scaled(self.posterior(images).draw(key.local_generator("latent", images.device)))

    def decode(self, x: Tensor) -> Tensor:
        latents = x / per_channel(self.scale, x) + per_channel(self.shift, x)
        return decode_latents(self.autoencoder, latents)

    def posterior(self, images: Tensor) -> Posterior:
        """The autoencoder's latents of images (B, C, H, W), before shift and scale; given latents as they are."""
        return Posterior(images) if self.encoded else encode_images(self.autoencoder, images)

    def measure(self, batches: Iterable[Tensor]) -> None:
        """The autoencoder's own measuring, where it has any, then shift and scale: `batches` are gone through twice."""
        if self._autoencoder_needs_measuring:
            self._measure_autoencoder(batches)
        if bool(self.scale.isnan().any()):
            drawn = (
                self.posterior(images).draw(RandomKey(batch=number).generator("moments", images.device))
                for number, images in enumerate(batches)
            )
            self.shift, std = channel_moments(drawn, NUM_IMAGES, self.scale.device)
            self.scale = self._deviation / std

    @property
    def _autoencoder_needs_measuring(self) -> bool:
        return bool(getattr(self.autoencoder, "needs_measuring", False))

    def _measure_autoencoder(self, batches: Iterable[Tensor]) -> None:
        if not (self.save_autoencoder or isinstance(self.autoencoder, PretrainedAutoencoder)):
            raise ValueError(
                f"{type(self.autoencoder).__name__} is measured on the training images, and save_autoencoder=False "
                "would lose what was measured. Set save_autoencoder=True."
            )
        self.autoencoder.measure(() if self.encoded else batches)  # type: ignore[operator]
        self._fingerprint = None

    def _scaled(self, latents: Tensor) -> Tensor:
        if len(self.scale) not in (1, latents.shape[1]) or len(self.shift) not in (1, latents.shape[1]):
            raise ValueError(
                f"Found latents of {latents.shape[1]} channels, but shift and scale for {len(self.scale)}; expected "
                "one number for each channel, or one for all. Leave them out to measure them."
            )
        return (latents - per_channel(self.shift, latents)) * per_channel(self.scale, latents)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Shift and scale, and the autoencoder's parameters or their hash."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        if not self.save_autoencoder:
            for name in [name for name in state if name.startswith(prefix + AUTOENCODER)]:
                del state[name]
            state[prefix + FINGERPRINT] = torch.tensor(list(bytes.fromhex(self.fingerprint)))
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("shift", "scale"):
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(saved, device=self.scale.device))
        saved_hash = state_dict.pop(prefix + FINGERPRINT, None)
        if saved_hash is not None:
            self._refuse_other_autoencoder(bytes(saved_hash.tolist()).hex())
            own = self.autoencoder.state_dict(prefix=prefix + AUTOENCODER)
            state_dict.update({name: value for name, value in own.items() if name not in state_dict})
        self._fingerprint = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _refuse_other_autoencoder(self, saved: str) -> None:
        if isinstance(self.autoencoder, PretrainedAutoencoder):
            self.autoencoder.measure(())
        if saved != self.fingerprint:
            raise ValueError(
                f"The checkpoint was trained with an autoencoder whose parameters hash to {saved}; those of this "
                f"{type(self.autoencoder).__name__} hash to {self.fingerprint}. Give the one that it was trained with."
            )


def _numbers(given: list[float] | float | None) -> Tensor:
    numbers = torch.nan if given is None else given
    return torch.tensor(numbers if isinstance(numbers, list) else [numbers])


def _check_methods(autoencoder: nn.Module) -> None:
    missing = [name for name in ("encode", "decode") if not callable(getattr(autoencoder, name, None))]
    if missing:
        raise TypeError(
            f"{type(autoencoder).__name__} has no method {' or '.join(missing)}; expected an autoencoder: an nn.Module "
            "with encode(images) and decode(latents)."
        )
