"""The U-Net of EDM and ADM (Dhariwal & Nichol 2021; Karras et al. 2022, "DDPM++")."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, cat, nn

from lightning_diffusion.networks.base import Network
from lightning_diffusion.networks.embeddings import LabelEmbedding, NoiseEmbedding


class UNet(Network):
    """Residual blocks with adaptive group norm, attention at chosen levels, zero-initialised output.

    Any height and width: a level that does not halve evenly is rounded up and cut on the way back.

    Args:
        image_shape: (C, H, W).
        channels: width of the first level.
        multipliers: width of each level over `channels`; each level halves the resolution of the one before.
        num_blocks: residual blocks per level on the way down; one more on the way up.
        attention_levels: levels with self-attention, 0 the finest.
        num_classes: classes to condition on; 0 for none.
        dropout: in the residual blocks, while training.
        context_dim: width of embeddings to attend to, after each self-attention; 0 for none.

    Raises:
        ValueError: for a context_dim without attention levels; in `forward` for a context of another width.
    """

    float32_modules = ("embedding",)

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2),
        num_blocks: int = 2,
        attention_levels: Sequence[int] = (1,),
        num_classes: int = 0,
        dropout: float = 0.0,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        _check_attends(context_dim, attention_levels, len(multipliers))
        self.image_shape, self.num_classes = tuple(image_shape), num_classes
        self.context_dim = context_dim
        widths = [channels * m for m in multipliers]
        features = 4 * channels
        self.noise = NoiseEmbedding(channels)
        self.embedding = nn.Sequential(
            nn.Linear(channels, features), nn.SiLU(), nn.Linear(features, features)
        )
        self.label = LabelEmbedding(num_classes, features) if num_classes else None
        self.stem = nn.Conv2d(self.image_shape[0], widths[0], 3, padding=1)

        def block(inputs: int, level: int) -> Block:
            return Block(inputs, widths[level], features, level in attention_levels, dropout, context_dim)

        skips = [widths[0]]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            if level:
                self.down.append(Downsample(widths[level - 1]))
                skips.append(widths[level - 1])
            for _ in range(num_blocks):
                self.down.append(block(skips[-1], level))
                skips.append(width)
        self.middle = block(widths[-1], len(widths) - 1)
        self.up, inputs = nn.ModuleList(), widths[-1]
        for level in reversed(range(len(widths))):
            for _ in range(num_blocks + 1):
                self.up.append(block(inputs + skips.pop(), level))
                inputs = widths[level]
        self.norm = group_norm(widths[0])
        self.head = zeroed(nn.Conv2d(widths[0], self.image_shape[0], 3, padding=1))

    def forward(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """As `Network`, with context (B, T, context_dim) or None for the null context."""
        context = self._checked(context, x)
        embedding = self.embedding(self.noise(c_noise).to(x.dtype))
        if self.label is not None:
            embedding = embedding + self.label(label, len(x))
        embedding = F.silu(embedding)
        x = self.stem(x)
        skips = [x]
        for layer in self.down:
            x = layer(x, embedding, context)
            skips.append(x)
        x = self.middle(x, embedding, context)
        for layer in self.up:
            skip = skips.pop()
            x = layer(cat([resize_to(x, skip), skip], dim=1), embedding, context)
        output: Tensor = self.head(F.silu(self.norm(x)))
        return output

    def _checked(self, context: Tensor | None, x: Tensor) -> Tensor | None:
        if context is None:
            return x.new_zeros(len(x), 1, self.context_dim) if self.context_dim else None
        if context.ndim != 3 or context.shape[2] != self.context_dim:
            raise ValueError(
                f"Found context of shape {tuple(context.shape)}; expected (batch, tokens, {self.context_dim}), for the "
                f"network has context_dim={self.context_dim}. Give it the width of the embeddings, or others."
            )
        return context.to(x.dtype)


class Block(nn.Module):
    """x -> norm, SiLU, conv -> scale and shift by the embedding -> SiLU, dropout, conv, added to x; then attention."""

    def __init__(
        self, inputs: int, outputs: int, features: int, attention: bool, dropout: float, context_dim: int
    ) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = group_norm(outputs), zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.modulation = nn.Linear(features, 2 * outputs)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs, context_dim) if attention else None

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        x = (self.skip(x) + self.conv2(self.dropout(h))) * math.sqrt(0.5)
        return x if self.attention is None else self.attention(x, context)


class Attention(nn.Module):
    """Self-attention over positions, heads of about 64 channels, zero-initialised output; then to a context, if any."""

    def __init__(self, channels: int, context_dim: int = 0) -> None:
        super().__init__()
        self.heads = number_of_heads(channels)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zeroed(nn.Conv2d(channels, channels, 1))
        self.context = CrossAttention(channels, context_dim) if context_dim else None

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(1, (3, self.heads, -1)).flatten(-2).mT.unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        projected: Tensor = self.proj(h)
        x = (x + projected) * math.sqrt(0.5)
        return x if self.context is None else self.context(x, context)


class CrossAttention(nn.Module):
    """Attention from positions to a context (B, T, context_dim), zero-initialised output.

    Tokens that are zero are all alike, so a null context of any length is one token.
    """

    def __init__(self, channels: int, context_dim: int) -> None:
        super().__init__()
        self.heads = number_of_heads(channels)
        self.norm, self.context_norm = group_norm(channels), nn.LayerNorm(context_dim)
        self.query, self.key_value = nn.Conv2d(channels, channels, 1), nn.Linear(context_dim, 2 * channels)
        self.proj = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.query(self.norm(x)).unflatten(1, (self.heads, -1)).flatten(-2).mT
        k, v = (
            self.key_value(self.context_norm(context))
            .unflatten(2, (2, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        h = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        projected: Tensor = self.proj(h)
        return (x + projected) * math.sqrt(0.5)


class Downsample(nn.Module):
    """Halve height and width, rounding up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        output: Tensor = self.conv(x)
        return output


def resize_to(x: Tensor, skip: Tensor) -> Tensor:
    """x doubled in height and width where `skip` is larger, cut to its size."""
    if x.shape[-2:] == skip.shape[-2:]:
        return x
    return F.interpolate(x, scale_factor=2.0, mode="nearest")[..., : skip.shape[-2], : skip.shape[-1]]


def number_of_heads(channels: int) -> int:
    """Of about 64 channels each, a divisor."""
    return max(h for h in range(1, max(channels // 64, 1) + 1) if channels % h == 0)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with groups of at least four channels, at most 32 groups."""
    return nn.GroupNorm(
        max(g for g in range(1, min(32, max(channels // 4, 1)) + 1) if channels % g == 0), channels
    )


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Start the layer at zero, so that its branch starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _check_attends(context_dim: int, attention_levels: Sequence[int], levels: int) -> None:
    if context_dim and not set(attention_levels) & set(range(levels)):
        raise ValueError(
            f"Found context_dim={context_dim} with attention_levels={list(attention_levels)}; expected levels among "
            f"0 to {levels - 1} that attend to the context. Write attention_levels=[{levels - 1}]."
        )
