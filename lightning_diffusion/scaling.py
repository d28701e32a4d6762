"""Multiply many tensors in place, each by a factor that is known on their device only.

On the CPU the factors can be read for nothing, and tensors and units whose factor is 1 are not touched. On an
accelerator reading would wait for it, so everything is multiplied, by 1 where there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

FEW = 3  # picking units out costs so many times what multiplying them in their place does,
PICKING = 50_000  # and for each tensor as much as multiplying so many elements (measured on a CPU)


def readable(x: Tensor) -> bool:
    """Whether the host may look at a number without waiting for a device."""
    return x.device.type == "cpu"


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """All by one factor ()."""
    if not readable(factor) or factor.item() != 1:
        torch._foreach_mul_(list(tensors), factor)


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


def scale_units_(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Each unit by its own: all of a vector or scalar, or what has one index along the first axis.

    Args:
        tensors: in the order in which their units have their factors.
        factors: of all units one after another.
    """
    sizes = [len(x) if x.ndim > 1 else 1 for x in tensors]
    units = factors.ne(1).nonzero().flatten() if readable(factors) else None
    if units is None or len(units) * FEW > len(factors):
        parts = zip(factors.split_with_sizes(sizes), tensors, strict=True)
        torch._foreach_mul_(list(tensors), [_against(part, x) for part, x in parts])
    elif len(units):
        _scale_chosen_(tensors, factors, sizes, units)


def _scale_chosen_(tensors: Sequence[Tensor], factors: Tensor, sizes: Sequence[int], units: Tensor) -> None:
    ends = torch.tensor([0, *accumulate(sizes)])
    tensor_of = torch.bucketize(units, ends[1:], right=True)
    counts = tensor_of.bincount(minlength=len(sizes)).tolist()
    rows = (units - ends[tensor_of]).split_with_sizes(counts)
    own = factors[units].split_with_sizes(counts)
    whole = factors.split_with_sizes(list(sizes))
    for i in (i for i, count in enumerate(counts) if count):
        x = tensors[i]
        if x.numel() * (1 - FEW * counts[i] / sizes[i]) < PICKING:
            x.mul_(_against(whole[i], x))
        else:
            x.index_copy_(0, rows[i], x.index_select(0, rows[i]).mul_(_against(own[i], x)))


def _against(factors: Tensor, x: Tensor) -> Tensor:
    """Factors (units,) in a shape that broadcasts against a tensor."""
    return factors.view(-1, *[1] * (x.ndim - 1)) if x.ndim else factors.view(())
