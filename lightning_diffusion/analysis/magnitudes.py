"""Magnitudes of what operators compute, beside what their number format can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Magnitudes:
    """Of all outputs of one operator in one place.

    Args:
        calls: how often it ran.
        largest: the largest finite magnitude.
        limit: the largest number of the format that comes closest to it.
        squares, numbers: sum of squares of all finite values, and how many.
        overflows: calls that made infinity or NaN of finite numbers.
        nonzero: values that were not zero before they were rounded or multiplied.
        flushed: how many of them are zero afterwards.
        subnormal: values below the format's smallest normal number, but not zero.
        reduced: the largest number of elements that one output sums up.
    """

    calls: int = 0
    largest: float = 0.0
    limit: float = math.inf
    squares: float = 0.0
    numbers: int = 0
    overflows: int = 0
    nonzero: int = 0
    flushed: int = 0
    subnormal: int = 0
    reduced: float = 0.0

    @property
    def root_mean_square(self) -> float:
        """Of all finite values."""
        return math.sqrt(self.squares / self.numbers) if self.numbers else 0.0

    @property
    def relative(self) -> float:
        """The largest magnitude over the largest number of its format."""
        return self.largest / self.limit

    @property
    def flushed_share(self) -> float:
        """Of values that were not zero."""
        return self.flushed / self.nonzero if self.nonzero else 0.0

    def add(self, x: Tensor) -> bool:
        """Count an output; returns whether all of it is finite."""
        if x.dtype not in FLOATS or not x.numel():
            return True
        magnitudes = x.detach().abs().to(torch.promote_types(x.dtype, torch.float32))
        largest = float(magnitudes.max())
        if math.isfinite(largest):
            self._add(magnitudes, largest, torch.finfo(x.dtype))
            return True
        finite = magnitudes[magnitudes.isfinite()]
        if finite.numel():
            self._add(finite, float(finite.max()), torch.finfo(x.dtype))
        return False

    def _add(self, magnitudes: Tensor, largest: float, limits: torch.finfo) -> None:
        if largest / limits.max >= self.relative:
            self.largest, self.limit = largest, limits.max
        self.squares += float(torch.linalg.vector_norm(magnitudes, dtype=torch.float64)) ** 2
        self.numbers += magnitudes.numel()
        if limits.bits == 16:
            self.subnormal += int(((magnitudes > 0) & (magnitudes < limits.smallest_normal)).sum())

    def add_flushed(self, before: Tensor, after: Tensor) -> None:
        """Count values that a cast or a product (`before`: not zero) made zero."""
        self.nonzero += int(before.sum())
        self.flushed += int((before & (after == 0)).sum())
