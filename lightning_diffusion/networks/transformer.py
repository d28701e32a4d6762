"""Parts of transformers over image patches: attention, feed-forward layers, positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 100.0
"""For grids of tens of patches (Heo et al. 2024, axial); sequences of thousands take 10,000."""


class SelfAttention(nn.Module):
    """Attention among tokens (B, N, width).

    Args:
        width: of a token.
        heads: a divisor of the width.
        qk_norm: divide queries and keys by their root mean square, with a learned scale (Henry et al. 2020).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """rotation (N, width of a head / 2) as from `rotations`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        h = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(h.transpose(1, 2).flatten(2))
        return projected


class SwiGLU(nn.Module):
    """SiLU(a) b, a and b linear, back to the width (Shazeer 2020); as many weights as a plain layer of 4 widths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * -(-width // 3)
        self.gates, self.proj = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gates(x).chunk(2, dim=-1)
        projected: Tensor = self.proj(F.silu(a) * b)
        return projected


def gelu_layers(width: int) -> nn.Sequential:
    """To four times the width and back."""
    return nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
    )


def rotations(rows: int, columns: int, head_width: int, device: torch.device) -> Tensor:
    """Angles (rows * columns, head_width / 2), half of them by the row, half by the column, float32.

    A head's logits then depend on how many patches lie between two tokens, whatever the size of the image
    (Su et al. 2021, axial in two dimensions).
    """
    pairs = head_width // 4
    frequencies = ROTARY_BASE ** -(torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    down = torch.arange(rows, device=device, dtype=torch.float32)[:, None] * frequencies
    right = torch.arange(columns, device=device, dtype=torch.float32)[:, None] * frequencies
    grid = (rows, columns, pairs)
    return torch.cat([down[:, None].expand(grid), right[None].expand(grid)], dim=-1).flatten(0, 1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of features of x (..., N, width) by angles (N, width / 2); computed in float32."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = rotation.cos(), rotation.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """(1, rows * columns, width): sin and cos of the column, then of the row, frequencies 1 to 1e-4."""
    frequencies = 1e4 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    down = torch.arange(rows, dtype=torch.float64)[:, None, None] * frequencies
    right = torch.arange(columns, dtype=torch.float64)[None, :, None] * frequencies
    waves = (wave.expand(rows, columns, -1) for wave in (right.sin(), right.cos(), down.sin(), down.cos()))
    return torch.cat(list(waves), dim=-1).flatten(0, 1)[None].float()
