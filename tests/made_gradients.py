"""Parameters with gradients, to clip."""

from __future__ import annotations

import torch
from torch import nn

SHAPES = [(7, 5), (7,), (), (40, 2, 3, 3), (3, 1), (1, 6)]


def parameters(seed=0, dtype=torch.float64, spread=1.0):
    """Parameters with gradients, some units' a hundred times longer than others'."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in SHAPES:
        p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        length = 10 ** (2 * torch.rand(shape[:1], generator=generator, dtype=torch.float64) - 1.5)
        units = length.reshape(-1, *[1] * (len(shape) - 1)) if shape else length
        p.grad = (spread * units * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        made.append(p)
    return made


def grads(made):
    return [p.grad.clone() for p in made]
