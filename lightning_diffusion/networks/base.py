"""What the rest of the package expects of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lightning_diffusion.recording import Recorded


class Network(Recorded, nn.Module, ABC):
    """F(x, c_noise, **condition), of the shape of x.

    Conditions are the keywords that `forward` declares. Labels are int64 (B,), the null label is `num_classes`.

    Attributes:
        image_shape: (C, H, W) of x without the batch.
        num_classes: 0 if there are no labels.
    """

    image_shape: tuple[int, ...]
    num_classes: int = 0

    @abstractmethod
    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), c_noise (B,), label (B,) or None for the null label; returns (B, C, H, W)."""
