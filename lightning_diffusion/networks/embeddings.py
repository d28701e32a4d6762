"""Noise level and class as vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    """cos and sin of c_noise at geometrically spaced frequencies, in float32.

    The default serves both scales of c_noise: timesteps 0..999 (the usual 1e-4 to 1) and ln(sigma) / 4.

    Args:
        features: length of the vector, even.
        lowest, highest: frequencies in radians per unit of c_noise.
    """

    frequencies: Tensor

    def __init__(self, features: int, lowest: float = 1e-4, highest: float = 8.0) -> None:
        super().__init__()
        if features % 2:
            raise ValueError(f"Found {features} features for the noise embedding; expected an even number.")
        exponents = torch.linspace(math.log(lowest), math.log(highest), features // 2)
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise.float()[:, None] * self.frequencies.float()
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class LabelEmbedding(nn.Embedding):
    """One vector per class and one for the null label, which is number `num_classes`."""

    def __init__(self, num_classes: int, features: int) -> None:
        super().__init__(num_classes + 1, features)

    def forward(self, label: Tensor | None, batch: int) -> Tensor:  # type: ignore[override]
        if label is None:
            return self.weight[-1].expand(batch, -1)
        return super().forward(label)
