r"""The U-Net of EDM2 (Karras et al. 2024, configuration G): weights and activations keep their magnitude.

Weights have unit norm per output unit, activations unit variance per element, and every operation that would change
it is divided by its expected gain. Nothing grows over the training, so one learning rate serves all layers and sizes.
Paper sizes, by `channels`: XS 128, S 192, M 256, L 320, XL 384, XXL 448.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_diffusion.networks.base import Network
from lightning_diffusion.networks.magnitudes import (
    FourierFeatures,
    UnitWeight,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
)
from lightning_diffusion.networks.unet import resize_to

LARGEST_ACTIVATION = 256.0
RESIDUAL_BALANCE = 0.3


class MagnitudePreservingUNet(Network):
    """EDM2's U-Net; its uncertainty head is `Uncertainty` of the objective `EDM2`. Any height and width.

    While training each forward first puts the weights back to unit norm, in place. Two forwards before one backward are
    therefore an error of autograd: run the second in eval mode. Output and modulation start at zero. Of sharded
    parameters (FSDP2) the copies of the forward are normalised, which leaves plain weight normalisation.

    Args:
        image_shape: (C, H, W).
        channels: width of the first level.
        multipliers: width of each level over `channels`; each level halves the resolution of the one before.
        num_blocks: residual blocks per level on the way down; one more on the way up.
        attention_levels: levels with self-attention, 0 the finest.
        num_classes: classes to condition on; 0 for none. The null label is no class at all.
        head_channels: width of an attention head.
        dropout: in the residual blocks, while training.

    Raises:
        ValueError: where heads do not divide the width of a level with attention.
    """

    float32_modules = ("embedding", "*.modulation")

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attention_levels: Sequence[int] = (2, 3),
        num_classes: int = 0,
        head_channels: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_shape, self.num_classes = tuple(image_shape), num_classes
        widths = [channels * m for m in multipliers]
        features, last = max(widths), len(widths) - 1

        def branch(inputs: int, level: int, attends: bool) -> Branch:
            heads = _heads(widths[level], head_channels, level) if attends else 0
            return Branch(inputs, widths[level], features, heads, dropout)

        def encoder(inputs: int, level: int) -> EncoderBlock:
            return EncoderBlock(inputs, branch(widths[level], level, level in attention_levels))

        def decoder(inputs: int, skip: int, level: int) -> DecoderBlock:
            return DecoderBlock(inputs, skip, branch(inputs + skip, level, level in attention_levels))

        self.embedding = Embedding(widths[0], features, num_classes)
        self.stem = UnitWeight(self.image_shape[0] + 1, widths[0], 3)
        self.encoder, skips = nn.ModuleList(), [widths[0]]
        for level in range(len(widths)):
            if level:
                narrow = Branch(skips[-1], skips[-1], features, 0, dropout)
                self.encoder.append(EncoderBlock(skips[-1], narrow, halves=True))
                skips.append(skips[-1])
            for _ in range(num_blocks):
                self.encoder.append(encoder(skips[-1], level))
                skips.append(widths[level])
        middle = (branch(widths[last], last, attends) for attends in (True, False))
        self.decoder = nn.ModuleList(DecoderBlock(widths[last], 0, part) for part in middle)
        inputs = widths[last]
        for level in range(last, -1, -1):
            if level < last:
                wide = Branch(inputs, inputs, features, 0, dropout)
                self.decoder.append(DecoderBlock(inputs, 0, wide))
            for _ in range(num_blocks + 1):
                self.decoder.append(decoder(inputs, skips.pop(), level))
                inputs = widths[level]
        self.head = UnitWeight(widths[0], self.image_shape[0], 3)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        if not self.num_classes:
            return self.respond(x, c_noise)
        label = x.new_full((len(x),), self.num_classes, dtype=torch.int64) if label is None else label
        classes = torch.arange(self.num_classes, device=label.device)
        return self.respond(x, c_noise, (label[:, None] == classes).float())

    def respond(self, x: Tensor, c_noise: Tensor, classes: Tensor | None = None) -> Tensor:
        """As forward, with classes (B, num_classes): one-hot, zeros for none, mixtures between."""
        embedding = self.embedding(c_noise, classes)
        x = self.stem(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [x]
        for block in self.encoder:
            x = block(x, embedding)
            skips.append(x)
        for block in self.decoder:
            x = mp_cat(x, skips.pop()) if block.takes_skip else resize_to(x, skips[-1])
            x = block(x, embedding)
        output: Tensor = self.head(x, self.gain)
        return output

    def normalize_(self) -> None:
        """Put all weights to unit norm, in place, as the forward does while training."""
        for layer in self.modules():
            if isinstance(layer, UnitWeight):
                layer.normalize_()


class Embedding(nn.Module):
    """Noise level (B,) and classes (B, K) as one vector of unit magnitude (B, features), float32."""

    def __init__(self, channels: int, features: int, num_classes: int) -> None:
        super().__init__()
        self.fourier = FourierFeatures(channels)
        self.noise = UnitWeight(channels, features)
        self.label = UnitWeight(num_classes, features) if num_classes else None

    def forward(self, c_noise: Tensor, classes: Tensor | None) -> Tensor:
        embedding: Tensor = self.noise(self.fourier(c_noise))
        if self.label is not None:
            classes = (
                embedding.new_zeros(()).expand(len(c_noise), self.label.inputs)
                if classes is None
                else classes
            )
            label = self.label(classes.to(embedding.dtype) * math.sqrt(self.label.inputs))
            embedding = mp_sum(embedding, label, 0.5)
        return mp_silu(embedding)


class Branch(nn.Module):
    """What a block adds to its input, and the attention after it."""

    def __init__(self, inputs: int, outputs: int, features: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = UnitWeight(inputs, outputs, 3), UnitWeight(outputs, outputs, 3)
        self.modulation, self.gain = UnitWeight(features, outputs), nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.attention = CosineAttention(outputs, heads) if heads else None
        self.outputs = outputs

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv1(mp_silu(x))
        scale = self.modulation(embedding, self.gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        output: Tensor = self.conv2(self.dropout(y))
        return output

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """x and the branch's y summed, attended to and clipped."""
        x = mp_sum(x, y, RESIDUAL_BALANCE)
        x = x if self.attention is None else self.attention(x)
        return x.clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION)


class EncoderBlock(nn.Module):
    """Halve, change the width, normalise each pixel, then the branch."""

    def __init__(self, inputs: int, branch: Branch, halves: bool = False) -> None:
        super().__init__()
        self.branch, self.halves = branch, halves
        self.skip = UnitWeight(inputs, branch.outputs, 1) if inputs != branch.outputs else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.halves:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        x = normalize(x if self.skip is None else self.skip(x), (1,))
        return self.branch.join(x, self.branch(x, embedding))


class DecoderBlock(nn.Module):
    """The branch on an input joined with a skip of the encoder, or, at zero `skip` channels, on the input alone."""

    def __init__(self, inputs: int, skip: int, branch: Branch) -> None:
        super().__init__()
        self.branch, self.takes_skip = branch, skip > 0
        changes = inputs + skip != branch.outputs
        self.skip = UnitWeight(inputs + skip, branch.outputs, 1) if changes else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.branch(x, embedding)
        return self.branch.join(x if self.skip is None else self.skip(x), y)


class CosineAttention(nn.Module):
    """Self-attention over positions with normalised queries, keys and values: no logit exceeds sqrt(head width)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = UnitWeight(channels, 3 * channels, 1), UnitWeight(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3, self.heads, -1)).flatten(-2)
        q, k, v = normalize(qkv, (3,)).transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return mp_sum(x, self.proj(h), RESIDUAL_BALANCE)


def _heads(width: int, head_channels: int, level: int) -> int:
    if width % head_channels:
        raise ValueError(
            f"Found head_channels={head_channels} for {width} channels at level {level}; expected heads that divide "
            f"the width. Write head_channels={math.gcd(width, head_channels)}, or channels that are a multiple."
        )
    return width // head_channels
