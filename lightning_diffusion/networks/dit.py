"""The diffusion transformer (Peebles & Xie 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_diffusion.networks.base import Network
from lightning_diffusion.networks.embeddings import LabelEmbedding, NoiseEmbedding
from lightning_diffusion.networks.transformer import (
    SelfAttention,
    SwiGLU,
    gelu_layers,
    rotations,
    sine_positions,
)

NOISE_FEATURES = 256


@dataclass(frozen=True)
class DiTSize:
    """Width and depth; the published ones are methods.

    Args:
        width: of a token.
        depth: number of blocks.
        num_heads: attention heads, a divisor of the width.
    """

    width: int = 384
    depth: int = 12
    num_heads: int = 6

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(f"Found {self}; expected num_heads that divides the width.")

    @classmethod
    def small(cls) -> DiTSize:
        """DiT-S."""
        return cls(384, 12, 6)

    @classmethod
    def base(cls) -> DiTSize:
        """DiT-B."""
        return cls(768, 12, 12)

    @classmethod
    def large(cls) -> DiTSize:
        """DiT-L."""
        return cls(1024, 24, 16)

    @classmethod
    def extra_large(cls) -> DiTSize:
        """DiT-XL."""
        return cls(1152, 28, 16)


@dataclass(frozen=True)
class DiTOptions:
    """What transformers have learned since; `original()` is the paper's.

    Args:
        qk_norm: normalised queries and keys, so that attention logits cannot grow (Dehghani et al. 2023).
        rotary: rotary positions instead of sines added to the tokens; images of other sizes are then welcome.
        rms_norm: RMS instead of layer norm.
        swiglu: gated feed-forward layers instead of GELU, of as many weights.
        learned_variance: the head also puts out a variance, as published models do; nothing here uses it.
        frequencies: lowest and highest of the noise embedding, in radians per unit of c_noise.
    """

    qk_norm: bool = True
    rotary: bool = True
    rms_norm: bool = True
    swiglu: bool = True
    learned_variance: bool = False
    frequencies: tuple[float, float] = (1e-4, 8.0)

    @classmethod
    def original(cls, learned_variance: bool = False) -> DiTOptions:
        """As published: sines, layer norm, GELU, noise told as timesteps 0..999."""
        lowest = 1e4 ** (1 / (NOISE_FEATURES // 2) - 1)
        return cls(False, False, False, False, learned_variance, (lowest, 1.0))


class DiT(Network):
    """Transformer blocks over patches, modulated by noise level and class (adaLN-Zero); the output starts at zero.

    Args:
        image_shape: (C, H, W); with rotary positions other heights and widths can be sampled later.
        patch_size: side of a patch, a divisor of height and width.
        size: width, depth and heads.
        num_classes: classes to condition on; 0 for none.
        options: positions, norms and layers.

    Raises:
        ValueError: where patches do not divide the image or heads cannot be rotated.
    """

    float32_modules = ("embedding",)
    positions: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        patch_size: int = 2,
        size: DiTSize = DiTSize(),
        num_classes: int = 0,
        options: DiTOptions = DiTOptions(),
    ) -> None:
        super().__init__()
        self.image_shape, self.num_classes = tuple(image_shape), num_classes
        self.patch_size, self.options = patch_size, options
        self.head_width = size.width // size.num_heads
        self.grid = self._patches(*self.image_shape[1:])
        self._check_positions(size)
        channels, width = self.image_shape[0], size.width
        self.outputs = channels * (2 if options.learned_variance else 1)
        self.noise = NoiseEmbedding(NOISE_FEATURES, *options.frequencies)
        self.embedding = nn.Sequential(nn.Linear(NOISE_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = LabelEmbedding(num_classes, width) if num_classes else None
        self.stem = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        if not options.rotary:
            self.register_buffer("positions", sine_positions(*self.grid, width))
        self.blocks = nn.ModuleList(Block(size, options) for _ in range(size.depth))
        self.norm = norm(width, options)
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch_size**2 * self.outputs)
        self._initialise()

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.respond(x, c_noise, label)[:, : self.image_shape[0]]

    def respond(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """As forward, with the variance behind the output where it is learned: (B, C or 2 C, H, W)."""
        rows, columns = grid = self._patches(*x.shape[-2:])
        embedding = self.embedding(self.noise(c_noise).to(self.embedding[0].weight.dtype))
        if self.label is not None:
            embedding = embedding + self.label(label, len(x))
        embedding = F.silu(embedding)
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = tokens if self.options.rotary else tokens + self._sines(grid).to(tokens.dtype)
        rotation = rotations(rows, columns, self.head_width, x.device) if self.options.rotary else None
        for block in self.blocks:
            tokens = block(tokens, embedding, rotation)
        shift, scale = self.head_modulation(embedding)[:, None].chunk(2, dim=-1)
        patches = self.head(self.norm(tokens) * (1 + scale) + shift)
        return self._image(patches, grid)

    def _image(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """From (B, rows * columns, side * side * channels) to (B, channels, H, W)."""
        rows, columns, p = *grid, self.patch_size
        image = patches.reshape(len(patches), rows, columns, p, p, self.outputs).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(len(patches), self.outputs, rows * p, columns * p)

    def _patches(self, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(
                f"Found images of {height} x {width} for patch_size={p}; expected a height and a width that are "
                "multiples of it. Resize the images, or choose a patch_size that divides both."
            )
        return height // p, width // p

    def _sines(self, grid: tuple[int, int]) -> Tensor:
        if grid != self.grid:
            raise ValueError(
                f"Found {grid[0]} x {grid[1]} patches; sine positions were made for {self.grid[0]} x {self.grid[1]}. "
                "Train with DiTOptions(rotary=True) to sample other sizes."
            )
        return self.positions

    def _check_positions(self, size: DiTSize) -> None:
        unit, what = (self.head_width, "heads") if self.options.rotary else (size.width, "tokens")
        if unit % 4:
            raise ValueError(
                f"Found {what} of {unit} features in {size}; expected a multiple of 4, to hold sine and cosine of row "
                "and column. Choose another width, or other num_heads."
            )

    def _initialise(self) -> None:
        """Xavier-uniform matrices, embeddings of deviation 0.02; modulations and head at zero: blocks are nothing."""
        zero = ("bias", "modulation.weight", "head.weight")
        for name, p in self.named_parameters():
            if name.endswith(zero):
                nn.init.zeros_(p)
            elif name.startswith(("embedding.", "label.")):
                nn.init.normal_(p, std=0.02)
            elif p.ndim > 1:
                nn.init.xavier_uniform_(p.flatten(1))


class Block(nn.Module):
    """Attention, then feed-forward; each normalised, scaled and shifted before, and gated after, by the embedding."""

    def __init__(self, size: DiTSize, options: DiTOptions) -> None:
        super().__init__()
        self.norm1 = norm(size.width, options)
        self.attention = SelfAttention(size.width, size.num_heads, options.qk_norm)
        self.norm2 = norm(size.width, options)
        self.feed_forward = SwiGLU(size.width) if options.swiglu else gelu_layers(size.width)
        self.modulation = nn.Linear(size.width, 6 * size.width)

    def forward(self, x: Tensor, embedding: Tensor, rotation: Tensor | None) -> Tensor:
        modulation: Tensor = self.modulation(embedding)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, rotation)
        y: Tensor = self.feed_forward(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * y


def norm(width: int, options: DiTOptions) -> nn.Module:
    """Without parameters of its own: scale and shift come from the embedding."""
    cls = nn.RMSNorm if options.rms_norm else nn.LayerNorm
    return cls(width, eps=1e-6, elementwise_affine=False)
