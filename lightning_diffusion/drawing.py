"""Sampling from a module: the one place that grids, metrics and commands call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_diffusion.averaging import resolve_weights
from lightning_diffusion.batches import LABEL
from lightning_diffusion.guidance import Guidance
from lightning_diffusion.networks.base import Reweighted
from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.objective import Condition, DiffusionObjective
from lightning_diffusion.representation import Representation
from lightning_diffusion.resume import hash_seed
from lightning_diffusion.sampling import Denoiser, Sampler
from lightning_diffusion.sharing import Share
from lightning_diffusion.swapping import Swapping


class Drawing(nn.Module):
    """What DiffusionModule can do without a Trainer: denoise and sample."""

    network: nn.Module
    objective: DiffusionObjective
    representation: Representation
    sampler: Sampler
    averages: dict[str, dict[str, Tensor]]

    @property
    def num_classes(self) -> int:
        """Number of classes, which is also the null label; 0 without."""
        return int(getattr(self.network, "num_classes", 0))

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) as the network states it, None if it does not."""
        shape = getattr(self.network, "image_shape", None)
        return None if shape is None else tuple(shape)

    def denoiser(
        self, condition: Condition | None = None, guidance: Guidance | None = None, weights: str = "online"
    ) -> Denoiser:
        """x_0_hat = denoiser(x_t, level), in the space of the representation.

        Args:
            condition: {"label": int64 (B,), "context": (B, T, D)}; what is left out is null.
            guidance: moves the denoiser away from the one without the condition, or from another model's.
            weights: online, ema, ema:NAME or FILE.safetensors.

        Raises:
            ValueError: for weights that are not there or of another network; for guidance without a null label.
        """
        network = self._with_weights(weights)
        conditional = partial(self._denoise, network, dict(condition or {}))
        if guidance is None:
            return conditional
        guide = guidance.guide_for(self, dict(condition or {}))
        return guidance(conditional, guide or self._unconditional(network, guidance))

    def sample(
        self,
        num_samples: int,
        condition: Condition | None = None,
        *,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        weights: str = "online",
        seed: int = 0,
        share: Share | None = None,
    ) -> Tensor:
        """Images (N, C, H, W) in [-1, 1]; the same for the same seed, on the module's device.

        Args:
            num_samples: N.
            condition: {"label": int64 (N,)}; None is the null label.
            sampler: instead of the module's own.
            guidance, weights: as in `denoiser`.
            seed: of the noise, which is drawn on the CPU and so the same on every device.
            share: of this process where several draw together; all of them must call this, and get all images.
        """
        sampler, share = sampler or self.sampler, share or Share()
        batches = self.sample_batches(num_samples, condition, sampler, guidance, weights, seed, share=share)
        return share.join(torch.cat(list(batches)), num_samples)

    @torch.no_grad()
    def sample_batches(
        self,
        num_samples: int,
        condition: Condition | None,
        sampler: Sampler,
        guidance: Guidance | None = None,
        weights: str = "online",
        seed: int = 0,
        batch_size: int = 256,
        share: Share = Share(),
    ) -> Iterator[Tensor]:
        """The images of `sample`, batch by batch; which batch an image is in does not change its noise."""
        device = next(self.parameters()).device
        noise = torch.randn(num_samples, *self._noise_shape(), generator=_generator("cpu", seed, "sample"))
        noise, checked = share.own(noise), self._checked_condition(condition, num_samples)
        conditions = _split({name: share.own(value) for name, value in checked.items()}, batch_size)
        for number, (x, part) in enumerate(zip(torch.split(noise, batch_size), conditions, strict=False)):
            on_device = {name: value.to(device) for name, value in part.items()}
            generator = _generator(device, seed, "sampler", number)
            with evaluating(self.network):
                denoise = self.denoiser(on_device, guidance, weights)
                drawn = sampler(denoise, x.to(device), self.objective.schedule, generator)
            images = self.representation.decode(drawn)
            yield images.clamp(-1, 1) if self.representation.bounded else images

    def _denoise(self, network: nn.Module, condition: Condition, x_t: Tensor, level: NoiseLevel) -> Tensor:
        return self.representation.hold(self.objective.denoise(network, x_t, level, condition))

    def _unconditional(self, network: nn.Module, guidance: Guidance) -> Denoiser:
        if not self.num_classes and not getattr(self.network, "context_dim", 0):
            raise ValueError(
                f"{guidance} needs a null label, and {type(self.network).__name__} has no classes. Sample without "
                "guidance, train the network with num_classes and label_dropout, or use AutoGuidance."
            )
        if getattr(self, "label_dropout", None) == 0:
            raise ValueError(
                f"{guidance} needs a null label, and this model never saw one: label_dropout=0. Sample without "
                "guidance, train with label_dropout=0.1, or use AutoGuidance."
            )
        return partial(self._denoise, network, {})

    def network_weights(self, weights: str) -> dict[str, Tensor] | None:
        """The network's parameters by name, from online, ema, ema:NAME or FILE.safetensors; None for the online ones.

        Raises:
            ValueError: for weights that are not there or of another network.
        """
        values = resolve_weights(weights, self.averages)
        if values is None:
            return None
        own = dict(self.network.named_parameters())
        others = self.state_dict().keys() - {f"network.{name}" for name in own}
        named = {name.removeprefix("network."): x for name, x in values.items() if name not in others}
        _check_names(named, own, weights)
        return named

    def _with_weights(self, weights: str) -> nn.Module:
        values = self.network_weights(weights)
        if values is None:
            return self.network
        sharded = any(isinstance(part, FSDPModule) for part in self.network.modules())
        return Swapping(self.network, values) if sharded else Reweighted(self.network, values)

    def _noise_shape(self) -> tuple[int, ...]:
        if self.image_shape is None:
            raise ValueError(
                f"{type(self.network).__name__} does not say what shape it draws. Give it an attribute "
                "image_shape = (C, H, W)."
            )
        return self.image_shape

    def _checked_condition(self, condition: Condition | None, num_samples: int) -> dict[str, Tensor]:
        checked = dict(condition or {})
        for name, value in checked.items():
            if len(value) != num_samples:
                raise ValueError(
                    f"Found {len(value)} of condition {name!r}; expected one for each of {num_samples}."
                )
        label = checked.get(LABEL)
        if label is not None and not bool(((label >= 0) & (label <= self.num_classes)).all()):
            raise ValueError(
                f"Found labels from {int(label.min())} to {int(label.max())}; expected 0 to {self.num_classes - 1}, "
                f"or {self.num_classes} for no class."
            )
        return checked


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in eval mode for a while."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def _split(condition: Mapping[str, Tensor], batch_size: int) -> Iterator[dict[str, Tensor]]:
    if not condition:
        while True:
            yield {}
    for parts in zip(*(torch.split(value, batch_size) for value in condition.values()), strict=True):
        yield dict(zip(condition, parts, strict=True))


def _generator(device: torch.device | str, *parts: object) -> torch.Generator:
    return torch.Generator(device).manual_seed(hash_seed(*parts))


def _check_names(values: Mapping[str, Tensor], own: Mapping[str, Tensor], weights: str) -> None:
    wrong = [name for name, value in values.items() if name not in own or own[name].shape != value.shape]
    if wrong:
        raise ValueError(
            f"The weights {weights!r} are of another network: {len(wrong)} of {len(values)} tensors do not fit, such "
            f"as {wrong[0]!r} of shape {tuple(values[wrong[0]].shape)}. Use weights that this network was trained with."
        )
