"""Published state dicts in: EDM2 (Karras et al. 2024) and DiT (Peebles & Xie 2023); diffusers' models both ways.

The parameters are ours, under our names: `.network` of what is returned goes into a DiffusionModule like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_diffusion.diffusers_models import dit_from_diffusers as dit_from_diffusers
from lightning_diffusion.diffusers_models import dit_to_diffusers as dit_to_diffusers
from lightning_diffusion.diffusers_models import unet_from_diffusers as unet_from_diffusers
from lightning_diffusion.diffusers_models import unet_to_diffusers as unet_to_diffusers
from lightning_diffusion.networks.dit import DiT, DiTOptions, DiTSize
from lightning_diffusion.networks.magnitude_preserving import (
    CosineAttention,
    EncoderBlock,
    MagnitudePreservingUNet,
)
from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.preconditioning import EDMPreconditioning
from lightning_diffusion.weightings import Uncertainty


def _same(x: Any) -> Any:
    return x


class Entry(NamedTuple):
    """Where a published tensor goes: its name here, its layout here, and from the shape here to the published one."""

    name: str
    convert: Callable[[Tensor], Tensor] = _same
    published: Callable[[tuple[int, ...]], tuple[int, ...]] = _same


class EDM2Denoiser(nn.Module):
    """A published EDM2 network under its preconditioning.

    Attributes:
        network: for a DiffusionModule with the objective `EDM2(sigma_data)`.
        uncertainty: the head, `weighting` of that objective.
    """

    def __init__(self, network: MagnitudePreservingUNet, uncertainty: Uncertainty, sigma_data: float) -> None:
        super().__init__()
        self.network, self.uncertainty = network, uncertainty
        self.preconditioning = EDMPreconditioning(sigma_data=sigma_data)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """x_0_hat (B, C, H, W) of x at sigma (B,) or (), under one-hot labels (B, classes) or none."""
        level = self._level(x, sigma)
        c_in, _, _, c_noise = self.preconditioning(level)
        output = self.network.respond(c_in[:, None, None, None] * x, c_noise, class_labels)
        return self.preconditioning.to_x0(output, x, level)

    def log_variance(self, sigma: Tensor) -> Tensor:
        """u(sigma), the logarithm of the loss that the head expects, for sigma (B,)."""
        return self.uncertainty.log_loss(
            self.preconditioning.c_noise(NoiseLevel(torch.ones_like(sigma), sigma))
        )

    def _level(self, x: Tensor, sigma: Tensor) -> NoiseLevel:
        sigma = sigma.to(x.dtype).flatten().expand(len(x))
        return NoiseLevel(torch.ones_like(sigma), sigma)


class PublishedDiT(nn.Module):
    """A published DiT: all that it puts out at timesteps t, noise and variance.

    Attributes:
        network: gives the noise alone, for a DiffusionModule with the objective `DDPM()`.
    """

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noise and, where it was learned, variance (B, C or 2 C, H, W) for t in 0..999 (B,) and labels y (B,)."""
        return self.network.respond(x, t.float(), y)


def edm2_from_state_dict(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> EDM2Denoiser:
    """A denoiser (x, sigma, class_labels=None) -> x_0_hat from the tensors of a published EDM2 network.

    Args:
        state_dict: of EDM2's preconditioned network.
        config: img_resolution, img_channels, label_dim, model_channels, and where they are not the published default
            channel_mult, num_blocks, attn_resolutions, channels_per_head, sigma_data, dropout.

    Raises:
        ValueError: for tensors that are missing, not known or of other shapes than the configuration says.
    """
    multipliers = list(config.get("channel_mult", (1, 2, 3, 4)))
    attended = config.get("attn_resolutions", (16, 8))
    side, channels = config["img_resolution"], config["img_channels"]
    network = MagnitudePreservingUNet(
        (channels, side, side), config["model_channels"], multipliers, config.get("num_blocks", 3),
        [level for level in range(len(multipliers)) if side >> level in attended],
        config["label_dim"], config.get("channels_per_head", 64), config.get("dropout", 0.0),
    )  # fmt: skip
    head = state_dict.get("logvar_fourier.freqs", torch.empty(128))
    denoiser = EDM2Denoiser(network, Uncertainty(len(head)), config.get("sigma_data", 0.5))
    _load(denoiser, state_dict, dict(_edm2_entries(network, side, config.get("num_blocks", 3))))
    return denoiser.eval()


def dit_from_state_dict(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> PublishedDiT:
    """A network (x, t, y) -> output from the tensors of a published DiT.

    Args:
        state_dict: of DiT.
        config: input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes, learn_sigma.

    Raises:
        ValueError: for tensors that are missing, not known or of other shapes than the configuration says.
    """
    size = DiTSize(config["hidden_size"], config["depth"], config["num_heads"])
    shape = (config["in_channels"], config["input_size"], config["input_size"])
    options = DiTOptions.original(learned_variance=config["learn_sigma"])
    network = DiT(shape, config["patch_size"], size, config["num_classes"], options)
    published = PublishedDiT(network)
    _load(published, state_dict, dict(_dit_entries(network)))
    return published.eval()


def _edm2_entries(
    network: MagnitudePreservingUNet, side: int, num_blocks: int
) -> Iterator[tuple[str, Entry]]:
    yield from _EDM2.items()
    if network.num_classes:
        yield "unet.emb_label.weight", Entry("network.embedding.label.weight")
    yield f"unet.enc.{side}x{side}_conv.weight", Entry("network.stem.weight")
    sides = [side >> level for level in range(_levels(network))]
    yield from _block_entries("encoder", network.encoder, list(_encoder_names(sides, num_blocks)))
    yield from _block_entries("decoder", network.decoder, list(_decoder_names(sides, num_blocks)))


_EDM2 = {
    "logvar_fourier.freqs": Entry("uncertainty.frequencies", lambda x: x / (2 * math.pi)),
    "logvar_fourier.phases": Entry("uncertainty.phases", lambda x: x / (2 * math.pi)),
    "logvar_linear.weight": Entry("uncertainty.weight", lambda x: x[0], lambda shape: (1, *shape)),
    "unet.emb_fourier.freqs": Entry("network.embedding.fourier.frequencies"),
    "unet.emb_fourier.phases": Entry("network.embedding.fourier.phases"),
    "unet.emb_noise.weight": Entry("network.embedding.noise.weight"),
    "unet.out_conv.weight": Entry("network.head.weight"),
    "unet.out_gain": Entry("network.gain"),
}
_EDM2_BLOCK = {
    "branch.conv1.weight": "conv_res0.weight",
    "branch.conv2.weight": "conv_res1.weight",
    "branch.modulation.weight": "emb_linear.weight",
    "branch.gain": "emb_gain",
    "branch.attention.qkv.weight": "attn_qkv.weight",
    "branch.attention.proj.weight": "attn_proj.weight",
    "skip.weight": "conv_skip.weight",
}


def _levels(network: MagnitudePreservingUNet) -> int:
    return 1 + sum(block.halves for block in network.encoder if isinstance(block, EncoderBlock))


def _encoder_names(sides: Sequence[int], num_blocks: int) -> Iterator[str]:
    for side in sides:
        if side != sides[0]:
            yield f"enc.{side}x{side}_down"
        yield from (f"enc.{side}x{side}_block{number}" for number in range(num_blocks))


def _decoder_names(sides: Sequence[int], num_blocks: int) -> Iterator[str]:
    for side in reversed(sides):
        first = ("in0", "in1") if side == sides[-1] else ("up",)
        yield from (f"dec.{side}x{side}_{name}" for name in first)
        yield from (f"dec.{side}x{side}_block{number}" for number in range(num_blocks + 1))


def _block_entries(ours: str, blocks: nn.ModuleList, published: Sequence[str]) -> Iterator[tuple[str, Entry]]:
    for number, (block, theirs) in enumerate(zip(blocks, published, strict=True)):
        for name, _ in block.named_parameters():
            is_qkv = name == "branch.attention.qkv.weight"
            attention = block.get_submodule("branch.attention") if is_qkv else None
            convert = (
                partial(_regroup, heads=attention.heads) if isinstance(attention, CosineAttention) else _same
            )
            yield f"unet.{theirs}.{_EDM2_BLOCK[name]}", Entry(f"network.{ours}.{number}.{name}", convert)


def _regroup(qkv: Tensor, heads: int) -> Tensor:
    """From output channels (head, channel, q k v) to (q k v, head, channel)."""
    return qkv.reshape(heads, -1, 3, *qkv.shape[1:]).movedim(2, 0).reshape(qkv.shape)


def _dit_entries(network: DiT) -> Iterator[tuple[str, Entry]]:
    for name in network.state_dict():
        convert = _ascending if name == "embedding.0.weight" else _same
        yield _dit_name(name), Entry(f"network.{name}", convert)


_DIT = {
    "stem": "x_embedder.proj",
    "embedding.0": "t_embedder.mlp.0",
    "embedding.2": "t_embedder.mlp.2",
    "label": "y_embedder.embedding_table",
    "modulation": "adaLN_modulation.1",
    "attention.qkv": "attn.qkv",
    "attention.proj": "attn.proj",
    "feed_forward.0": "mlp.fc1",
    "feed_forward.2": "mlp.fc2",
    "head": "final_layer.linear",
    "head_modulation": "final_layer.adaLN_modulation.1",
}


def _dit_name(ours: str) -> str:
    """'blocks.0.attention.qkv.weight' -> 'blocks.0.attn.qkv.weight'."""
    if ours == "positions":
        return "pos_embed"
    layer, _, kind = ours.rpartition(".")
    block = ".".join(layer.split(".")[:2]) + "." if layer.startswith("blocks.") else ""
    return f"{block}{_DIT[layer.removeprefix(block)]}.{kind}"


def _ascending(weight: Tensor) -> Tensor:
    """Columns for cos and sin from the highest to the lowest frequency, put the other way round."""
    return weight.reshape(len(weight), 2, -1).flip(2).reshape(weight.shape)


def _load(module: nn.Module, published: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> None:
    own = module.state_dict()
    expected = {name: entry.published(tuple(own[entry.name].shape)) for name, entry in entries.items()}
    _check(published, expected)
    module.load_state_dict({entry.name: entry.convert(published[name]) for name, entry in entries.items()})


def _check(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not known" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"The state dict is of another network than the configuration says: {'; '.join(problems[:8])}{more}. "
            "Give the configuration that the network was made with."
        )
