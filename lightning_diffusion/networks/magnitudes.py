"""Parts that keep magnitudes: weights of unit norm, sums and activations of unit variance (Karras et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-4
"""Added to a magnitude before dividing by it."""


class UnitWeight(nn.Module):
    """A linear map or, with a kernel, a convolution; no bias, unit norm per output unit (eqs. 47, 66).

    The norm is forced while training: the optimizer's step would otherwise lengthen the weights and so shrink its own
    effect. The norm in the graph keeps gradients perpendicular to the weights.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 0) -> None:
        super().__init__()
        self.inputs = inputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *(kernel, kernel) if kernel else ()))

    @torch.no_grad()
    def normalize_(self) -> None:
        """Put the weight to root mean square 1 per output unit, in place."""
        self.weight.copy_(normalize(self.weight, range(1, self.weight.ndim)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        if self.training and torch.is_grad_enabled() and self.weight.requires_grad:
            self.normalize_()
        weight = normalize(at_least_float32(self.weight), range(1, self.weight.ndim))
        weight = (weight * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class FourierFeatures(nn.Module):
    """sqrt(2) cos(f c_noise + phi), unit magnitude (eq. 75), in float32; c_noise should be of order 1."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = at_least_float32(c_noise)[:, None] * self.frequencies.float() + self.phases.float()
        return angles.cos() * math.sqrt(2)


def normalize(x: Tensor, dims: Sequence[int]) -> Tensor:
    """x over (1e-4 + its root mean square along `dims`), of the same type; computed in float32 at least."""
    raised = at_least_float32(x)
    norm: Tensor = torch.linalg.vector_norm(raised, dim=tuple(dims), keepdim=True)
    rms = norm * math.sqrt(norm.numel() / x.numel())
    return (raised / (EPSILON + rms)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over its root mean square on N(0, 1) (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, of unit variance if a and b are so and uncorrelated (eq. 88)."""
    return a.lerp(b.to(a.dtype), t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """a and b joined, each with half of the variance whatever its channels (eq. 103 at t = 0.5)."""
    total = a.shape[1] + b.shape[1]
    return torch.cat([a * math.sqrt(total / 2 / a.shape[1]), b * math.sqrt(total / 2 / b.shape[1])], dim=1)


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
