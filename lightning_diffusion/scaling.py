"""Multiply many tensors in place, each by a factor that is known on their device only.

On the CPU the factors can be read for nothing, and tensors and units whose factor is 1 are not touched. On an
accelerator reading would wait for it, so everything is multiplied, by 1 where there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FEW = 3  # units are picked out if there are less than one in so many, else the whole tensor is multiplied


def readable(x: Tensor) -> bool:
    """Whether the host may look at a number without waiting for a device."""
    return x.device.type == "cpu"


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """All by one factor ()."""
    if not readable(factor):
        torch._foreach_mul_(list(tensors), factor)
    elif factor.item() != 1:
        torch._foreach_mul_(list(tensors), factor.item())


def scale_each_(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Each by its own, factors (len(tensors),)."""
    if not readable(factors):
        torch._foreach_mul_(list(tensors), list(factors.unbind()))
        return
    for tensor, factor in zip(tensors, factors.tolist(), strict=True):
        if factor != 1:
            tensor.mul_(factor)


def where_over_(tensors: Sequence[Tensor], over: Tensor, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Change those marked in `over` (len(tensors),), or all where marks cannot be read; what `change` gives."""
    if readable(over):
        return [change(x) for x, marked in zip(tensors, over.tolist(), strict=True) if marked]
    return [change(x) for x in tensors]


def scale_units_(tensors: Sequence[Tensor], units: Sequence[Tensor], factors: Tensor) -> None:
    """Each unit by its own.

    Args:
        tensors: with units along the first axis, or of one unit.
        units: one tensor for each, of the shape in which its factors broadcast.
        factors: of all units one after another, shape (sum of units.numel(),).
    """
    sizes = [unit.numel() for unit in units]
    parts = [part.view(unit.shape) for part, unit in zip(factors.split_with_sizes(sizes), units, strict=True)]
    if not readable(factors):
        torch._foreach_mul_(list(tensors), parts)
        return
    rows = (factors == 1).logical_not().nonzero().flatten()
    if len(rows):
        _scale_rows_(tensors, parts, sizes, rows)


def _scale_rows_(
    tensors: Sequence[Tensor], parts: Sequence[Tensor], sizes: Sequence[int], rows: Tensor
) -> None:
    ends = torch.tensor(sizes).cumsum(0)
    counts = torch.bucketize(rows, ends, right=True).bincount(minlength=len(sizes)).tolist()
    chosen = rows.split_with_sizes(counts)
    for tensor, part, size, end, own in zip(tensors, parts, sizes, ends.tolist(), chosen, strict=True):
        if len(own) * FEW > size or (len(own) and tensor.ndim < 2):
            tensor.mul_(part)
        elif len(own):
            here = own - (end - size)
            tensor.index_copy_(0, here, tensor.index_select(0, here).mul_(part.index_select(0, here)))
