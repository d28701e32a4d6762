"""Multiply many tensors in place, each by a factor that is known on their device only.

On the CPU the factors can be read for nothing, and tensors and units whose factor is 1 are not touched. On an
accelerator reading would wait for it, so everything is multiplied, by 1 where there is nothing to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

FEW = 3  # picking units out costs so many times what multiplying them in their place does,
PICKING = 50_000  # and for each tensor as much as multiplying so many elements (measured on a CPU)


def readable(x: Tensor) -> bool:
    """Whether the host may look at a number without waiting for a device."""
    return x.device.type == "cpu"


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> bool:
    """All by one factor (); whether anything was touched."""
    needed = not readable(factor) or factor.item() != 1
    if needed:
        torch._foreach_mul_(list(tensors), factor)
    return needed


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
    sizes = [x.shape[0] if x.ndim > 1 else 1 for x in tensors]
    units = factors.ne(1).nonzero().flatten() if readable(factors) else None
    if units is None or len(units) * FEW > len(factors):
        parts = zip(factors.split_with_sizes(sizes), tensors, strict=True)
        torch._foreach_mul_(list(tensors), [_against(part, x) for part, x in parts])
    elif len(units):
        _scale_chosen_(tensors, factors, sizes, units)


def _scale_chosen_(tensors: Sequence[Tensor], factors: Tensor, sizes: Sequence[int], units: Tensor) -> None:
    ends = list(accumulate(sizes))
    tensor_of = torch.bucketize(units, torch.tensor(ends), right=True)
    counts = tensor_of.bincount(minlength=len(sizes)).tolist()
    starts = torch.tensor([0, *ends])
    chosen = [i for i, count in enumerate(counts) if count]
    each = [counts[i] for i in chosen]
    rows = (units - starts[tensor_of]).split_with_sizes(each)
    own = factors[units].split_with_sizes(each)
    for i, its_rows, its_factors in zip(chosen, rows, own, strict=True):
        x = tensors[i]
        if x.dtype == factors.dtype and x.numel() * (1 - FEW * counts[i] / sizes[i]) > PICKING:
            _scale_rows_(x, its_rows, its_factors)
        else:
            x.mul_(_against(factors[ends[i] - sizes[i] : ends[i]], x))


def _scale_rows_(x: Tensor, rows: Tensor, factors: Tensor) -> None:
    _hear_of_beta()
    x.index_reduce_(0, rows, _against(factors, x).expand(-1, *x.shape[1:]), "prod")


@cache
def _hear_of_beta() -> None:
    """torch says once that index_reduce_ is in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ones(1).index_reduce_(0, torch.zeros(1, dtype=torch.long), torch.ones(1), "prod")


def _against(factors: Tensor, x: Tensor) -> Tensor:
    """Factors (units,) in a shape that broadcasts against a tensor."""
    return factors.view(-1, *[1] * (x.ndim - 1)) if x.ndim else factors.view(())
