r"""Gradients under control: their norms, rules that bound them, and what is not a number.

    g, |g|   the gradient of a parameter, or of one unit of it, and its Euclidean norm
    w, |w|   the parameter itself
    unit     all elements with one index along the first axis; vectors and scalars are one unit (norms.py)

A rule multiplies gradients, in place, by factors <= 1, so that directions are kept: of everything (GlobalNorm), of
an optimizer group, of a parameter or of a unit; Value alone cuts elements. On an accelerator every rule is the same
sequence of kernels whatever the numbers are, and nothing waits for the device; on the CPU only gradients that are
over their bound are touched. Gradients have to be unscaled: thresholds mean the true ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_diffusion.norms import Gradients as Gradients
from lightning_diffusion.norms import largest_magnitudes, tensor_norms
from lightning_diffusion.scaling import where_over_

SMALLEST_NORM = 1e-6  # below it a gradient is taken as this long, Brock et al. 2021 and torch.nn.utils


class ClippingRule(ABC):
    """Bounds gradients in place; a frozen dataclass with one method."""

    relative: ClassVar[bool] = False
    """Whether bounds follow the weights, so that weights which start at zero would hardly move."""

    def __call__(self, gradients: Gradients) -> Tensor:
        """Clip; returns which share () of what the rule looks at was over its bound, without waiting for it."""
        if not len(gradients):
            return torch.zeros(())
        with torch.no_grad():
            return self.clip_(gradients)

    @property
    def looks_at_units(self) -> bool:
        """Whether it asks for units' norms, so that all others are better made of them."""
        return False

    @abstractmethod
    def clip_(self, gradients: Gradients) -> Tensor:
        """Clip at least one gradient by methods of `Gradients`; the share () that was over its bound."""


@dataclass(frozen=True)
class GlobalNorm(ClippingRule):
    """g <- g min(1, max_norm / |all g|), as torch.nn.utils.clip_grad_norm_ (Pascanu et al. 2013).

    Share: 1 if it clipped, else 0. `max_norm` above 0; infinity leaves everything as it is, to log norms only.
    """

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        _check_above_zero(self, max_norm=self.max_norm)

    def clip_(self, gradients: Gradients) -> Tensor:
        factor = _limit(self.max_norm, gradients.norm)
        gradients.scale_(factor)
        return (factor < 1).float()


@dataclass(frozen=True)
class ParameterGroupNorm(ClippingRule):
    """GlobalNorm in each of the optimizer's parameter groups by itself (not torch's GroupNorm layer).

    Share: of groups that were clipped.
    """

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        _check_above_zero(self, max_norm=self.max_norm)

    def clip_(self, gradients: Gradients) -> Tensor:
        _ = gradients.norms  # of all groups in one reduction
        return torch.stack([GlobalNorm(self.max_norm).clip_(group) for group in gradients.by_group()]).mean()


@dataclass(frozen=True)
class ParameterNorm(ClippingRule):
    """Each parameter by itself: g <- g min(1, max_norm / |g|). Share: of parameters that were clipped."""

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        _check_above_zero(self, max_norm=self.max_norm)

    def clip_(self, gradients: Gradients) -> Tensor:
        factors = _limit(self.max_norm, torch.stack(gradients.norms))
        gradients.scale_each_(factors)
        return _share(factors)


@dataclass(frozen=True)
class UnitNorm(ClippingRule):
    """Each unit, an output channel say, by itself: g <- g min(1, max_norm / |g|). Share: of units clipped."""

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        _check_above_zero(self, max_norm=self.max_norm)

    @property
    def looks_at_units(self) -> bool:
        return True

    def clip_(self, gradients: Gradients) -> Tensor:
        factors = _limit(self.max_norm, gradients.unit_norms)
        gradients.scale_units_(factors)
        return _share(factors)


@dataclass(frozen=True)
class Value(ClippingRule):
    """Each element to [-limit, limit], which changes directions. Share: of parameters with one over the limit."""

    limit: float = 1.0

    def __post_init__(self) -> None:
        _check_above_zero(self, limit=self.limit)

    def clip_(self, gradients: Gradients) -> Tensor:
        tensors = [g for g in gradients.tensors if g.numel()]
        if not tensors:
            return torch.zeros(())
        over = (largest_magnitudes(tensors) <= self.limit).logical_not()
        where_over_(tensors, over, lambda g: g.clamp_(-self.limit, self.limit))
        gradients.forget()
        return over.float().mean()


@dataclass(frozen=True)
class Adaptive(ClippingRule):
    """Adaptive gradient clipping: |g| at most clip_factor max(|w|, eps) in each unit (Brock et al. 2021, eq. 3).

    Share: of units (or parameters) that were clipped.

    Args:
        clip_factor: largest gradient relative to its weights, above 0; the paper's 0.01 for large batches.
        eps: weights count as at least this long, or those that start at zero would never move; above 0.
        by_unit: false takes each parameter as a whole.
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    by_unit: bool = True
    relative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_above_zero(self, clip_factor=self.clip_factor, eps=self.eps)

    @property
    def looks_at_units(self) -> bool:
        return self.by_unit

    def clip_(self, gradients: Gradients) -> Tensor:
        g, w = self._norms(gradients)
        limit = w.clamp(min=self.eps).mul_(self.clip_factor)
        factors = torch.where(g < limit, 1.0, limit / g.clamp(min=SMALLEST_NORM))
        if self.by_unit:
            gradients.scale_units_(factors)
        else:
            gradients.scale_each_(factors)
        return _share(factors)

    def _norms(self, gradients: Gradients) -> Sequence[Tensor]:
        if self.by_unit:
            return gradients.unit_norms_and_weights()
        return torch.stack(tensor_norms([*gradients.whole, *gradients.parameters])).chunk(2)


@dataclass(frozen=True)
class Normalise(ClippingRule):
    """g <- g norm / |all g|: steps of one length (normalised gradient descent). A zero gradient stays zero.

    Share: 1 if the gradient was longer than `norm`, which is above 0.
    """

    norm: float = 1.0

    def __post_init__(self) -> None:
        _check_above_zero(self, norm=self.norm)

    def clip_(self, gradients: Gradients) -> Tensor:
        norm = gradients.norm
        gradients.scale_(torch.where(norm == 0, 1.0, self.norm / norm))
        return (norm > self.norm).float()


def clip_adaptively_(parameters: Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3) -> Tensor:
    """Shrink in place each unit's gradient to at most `clip_factor` max(|w|, eps) (Brock et al. 2021, eq. 3).

    Returns: the share () of units that were clipped, on the device.
    """
    return Adaptive(clip_factor, eps)(Gradients([parameters]))


@torch.no_grad()
def sanitize_(gradients: Gradients, nan: float = 0.0, posinf: float = 1e5, neginf: float = -1e5) -> Tensor:
    """Put numbers in place of NaN and infinities (Karras et al. 2022 do so before every step).

    Limits beyond a half-precision gradient's largest number become that number.

    Returns: how many elements () of this process's shards were changed, on the device.
    """
    if not len(gradients):
        return torch.zeros(())
    broken = torch.stack(gradients.norms).isfinite().logical_not()
    counts = where_over_(gradients.tensors, broken, lambda g: _make_finite_(g, nan, posinf, neginf))
    if not counts:
        return torch.zeros((), device=broken.device)
    gradients.forget()
    return torch.stack(counts).sum()


def _make_finite_(g: Tensor, nan: float, posinf: float, neginf: float) -> Tensor:
    count = g.isfinite().logical_not_().sum()
    largest = torch.finfo(g.dtype).max
    torch.nan_to_num(g, nan, min(posinf, largest), max(neginf, -largest), out=g)
    return count


def _limit(bound: float, norms: Tensor) -> Tensor:
    return (bound / (norms + SMALLEST_NORM)).clamp(max=1.0)


def _share(factors: Tensor) -> Tensor:
    return (factors < 1).float().mean()


def _check_above_zero(rule: ClippingRule, **values: float) -> None:
    for name, value in values.items():
        if math.isnan(value) or value <= 0:
            raise ValueError(
                f"{type(rule).__name__}({name}={value}) bounds nothing: expected a number above 0. Leave the "
                "callback out to clip nothing."
            )
