"""Euclidean norms of tensors and gradients, whole or unit by unit, sharded or not.

    unit    all elements with one index along the first axis: an output channel; vectors and scalars are one unit
    shard   what one process holds of a DTensor; norms are those of the whole tensor

Norms are float32 at least. Those of shards need one all-reduce per device mesh for all tensors together, and
none where units are not divided. Nothing here waits for the device.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from lightning_diffusion import scaling
from lightning_diffusion.averaging import local

AXES = [tuple(range(1, ndim)) for ndim in range(16)]  # of one unit
Reduction = tuple[DeviceMesh, tuple[Placement, ...]]


@torch.no_grad()
def tensor_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norm () of every tensor."""
    norms = _local_norms([local(x) for x in tensors])
    return _over_shards(norms, tensors, by_unit=False)


@torch.no_grad()
def unit_norms(*lists: Sequence[Tensor]) -> list[Tensor]:
    """Norm of every unit in each list, shape (units of its local shards,), in the order of `vectors_first`."""
    ordered = [vectors_first(tensors) for tensors in lists]
    if any(isinstance(x, DTensor) for tensors in ordered for x in tensors):
        return _unit_norms_of_shards(ordered)
    return [torch.cat(_unit_norms(tensors)) for tensors in ordered]


def vectors_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Vectors and scalars, then matrices and what has more axes, each in their order."""
    return [x for x in tensors if x.ndim < 2] + [x for x in tensors if x.ndim > 1]


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """Norm () of everything from the norms () of its parts."""
    total: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return total


def norms_of_parts(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Norm of each of the consecutive parts of a vector, shape (len(lengths),)."""
    if not scaling.readable(x) or x.is_complex():
        return torch.stack(torch._foreach_norm(x.split_with_sizes(list(lengths)), 2, dtype=_norm_type([x])))
    sums = torch.segment_reduce(x.double().square(), "sum", lengths=torch.tensor(lengths), initial=0)
    return sums.sqrt().to(_norm_type([x]))


def largest_magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """Largest absolute value in every tensor's local shard, shape (len(tensors),)."""
    return torch.stack(torch._foreach_norm(list(tensors), torch.inf))


class Gradients:
    """The gradients of some parameters; their norms are computed once, for all that ask.

    Whoever changes gradients in place has to call `forget`, or to do it by `scale_`, `scale_each_` and `scale_units_`.

    Args:
        groups: parameters by optimizer group; those that have no gradient are left out.
        by_unit: units' norms will be asked for, so all others are made of them and nothing is read twice.

    Raises:
        ValueError: a gradient is sparse.
    """

    def __init__(self, groups: Iterable[Iterable[Tensor]], by_unit: bool = False) -> None:
        self.groups = [[p for p in group if _has_gradient(p)] for group in groups]
        self.parameters = [p for group in self.groups for p in group]
        self.sharded = any(isinstance(p.grad, DTensor) for p in self.parameters)
        self.by_unit = by_unit and not self.sharded
        self._norms: dict[int, Tensor] = {}
        self._units: dict[int, Tensor] = {}
        self._totals: dict[tuple[int, ...], Tensor] = {}

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def tensors(self) -> list[Tensor]:
        """The gradients, this process's shards."""
        return [local(g) for g in self.whole] if self.sharded else self.whole

    @property
    def whole(self) -> list[Tensor]:
        """The gradients, DTensors where parameters are."""
        return [p.grad for p in self.parameters if p.grad is not None]

    @property
    def norms(self) -> list[Tensor]:
        """Norm () of each parameter's gradient, over all shards."""
        unknown = [p for p in self.parameters if id(p) not in self._norms]
        if unknown:
            fresh = self._of_units(unknown) if self.by_unit else tensor_norms(_gradients(unknown))
            self._norms.update((id(p), norm) for p, norm in zip(unknown, fresh, strict=True))
        return [self._norms[id(p)] for p in self.parameters]

    @property
    def norm(self) -> Tensor:
        """Norm () of all gradients together; not finite if one of their elements is not."""
        key = tuple(map(id, self.parameters))
        if key not in self._totals:
            self._totals[key] = total_norm(self.norms)
        return self._totals[key]

    @property
    def unit_norms(self) -> Tensor:
        """Norm of every unit of this process's shards, shape (units,), in the order of `vectors_first`."""
        if not self.by_unit:
            return unit_norms(self.whole)[0]
        self._learn_units(self.parameters)
        return torch.cat([self._units[id(p)] for p in vectors_first(self.parameters)])

    def unit_norms_and_weights(self) -> Sequence[Tensor]:
        """`unit_norms`, and the norms of the parameters' units; of shards in one reduction."""
        if self.sharded:
            return unit_norms(self.whole, self.parameters)
        return self.unit_norms, unit_norms(self.parameters)[0]

    @property
    def shards(self) -> int:
        """Among how many processes the elements are divided."""
        sharded = next((g for g in self.whole if isinstance(g, DTensor)), None)
        if sharded is None:
            return 1
        sizes = zip(sharded.device_mesh.shape, sharded.placements, strict=True)
        return math.prod(size for size, placement in sizes if not placement.is_replicate())

    def by_group(self) -> Iterator[Gradients]:
        """Each optimizer group's gradients, with the norms that are known."""
        return (self._sharing([group]) for group in self.groups if group)

    def without(self, parameters: Collection[int]) -> Gradients:
        """Those of parameters whose `id` is not among these, with the norms that are known."""
        if not parameters:
            return self
        return self._sharing([[p for p in group if id(p) not in parameters] for group in self.groups])

    def scale_(self, factor: Tensor) -> None:
        """Multiply all by one factor ()."""
        if scaling.scale_(self.tensors, factor):
            self.forget()

    def scale_each_(self, factors: Tensor) -> None:
        """Multiply each by its own factor, shape (len(self),)."""
        scaling.scale_each_(self.tensors, factors)
        self.forget()

    def scale_units_(self, factors: Tensor) -> None:
        """Multiply each unit by its own factor, shape (units,), in the order of `unit_norms`."""
        scaling.scale_units_(vectors_first(self.tensors), factors)
        norms = self.unit_norms * factors if self.by_unit and scaling.readable(factors) else None
        self.forget()
        if (
            norms is not None and norms.isfinite().all()
        ):  # a norm that overflowed tells nothing of what is left
            self._remember_units(self.parameters, norms)

    def forget(self) -> None:
        """These have changed: compute their norms anew when they are next asked for."""
        for known in (self._norms, self._units):
            for p in self.parameters if known else ():
                known.pop(id(p), None)
        self._totals.clear()

    def _of_units(self, parameters: Sequence[Tensor]) -> Iterable[Tensor]:
        self._learn_units(parameters)
        units = [self._units[id(p)] for p in parameters]
        return norms_of_parts(torch.cat(units), [norms.numel() for norms in units]).unbind()

    def _learn_units(self, parameters: Sequence[Tensor]) -> None:
        unknown = [p for p in parameters if id(p) not in self._units]
        if unknown:
            self._remember_units(unknown, unit_norms(_gradients(unknown))[0])

    def _remember_units(self, parameters: Sequence[Tensor], norms: Tensor) -> None:
        ordered = vectors_first(parameters)
        parts = norms.split_with_sizes([units_in(p) for p in ordered])
        self._units.update((id(p), part) for p, part in zip(ordered, parts, strict=True))

    def _sharing(self, groups: list[list[Tensor]]) -> Gradients:
        part = copy.copy(self)
        part.groups, part.parameters = groups, [p for group in groups for p in group]
        return part


def units_in(x: Tensor) -> int:
    """How many units a tensor has."""
    return x.shape[0] if x.ndim > 1 else 1


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _has_gradient(p: Tensor) -> bool:
    g = p.grad
    if g is None:
        return False
    if g.layout != torch.strided:
        raise ValueError(
            f"Found a gradient of shape {tuple(g.shape)} and layout {g.layout}; only dense ones can "
            "be clipped. Write sparse=False in the embedding, or give its optimizer no clipping."
        )
    if isinstance(g, DTensor) and isinstance(p, DTensor) and any(q.is_partial() for q in g.placements):
        p.grad = g.redistribute(placements=p.placements)
    return True


def _local_norms(tensors: list[Tensor]) -> list[Tensor]:
    if not tensors:
        return []
    plain = len({x.dtype for x in tensors}) == 1 and tensors[0].element_size() >= 4
    return list(torch._foreach_norm(tensors, 2, dtype=None if plain else _norm_type(tensors)))


def _norm_type(tensors: Sequence[Tensor]) -> torch.dtype:
    wide = {torch.float64, torch.complex128}
    return torch.float64 if any(x.dtype in wide for x in tensors) else torch.float32


def _unit_norms(ordered: Sequence[Tensor]) -> list[Tensor]:
    vectors = [x if x.ndim else x.view(1) for x in ordered if x.ndim < 2]
    together = [_vector_norms(vectors)] if vectors else []
    return together + [_row_norms(x) for x in ordered if x.ndim > 1]


def _vector_norms(vectors: list[Tensor]) -> Tensor:
    if scaling.readable(vectors[0]):  # there one small kernel for each costs more than a copy
        return norms_of_parts(torch.cat(vectors), [x.numel() for x in vectors])
    return torch.stack(_local_norms(vectors))


def _unit_norms_of_shards(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    tensors = [x for ordered in lists for x in ordered]
    parts = [part for x in tensors for part in _unit_norms([local(x)])]
    norms = iter(_over_shards(parts, tensors, by_unit=True))
    return [torch.cat([next(norms) for _ in ordered]) for ordered in lists]


def _row_norms(x: Tensor) -> Tensor:
    wider = torch.float32 if x.element_size() < 4 else None
    norms: Tensor = torch.linalg.vector_norm(x, 2, AXES[x.ndim], dtype=wider)
    return norms


def _reduction(x: Tensor, by_unit: bool) -> Reduction | None:
    """Over which dimensions of its mesh a DTensor's norms have to be summed; None if over none."""
    if not isinstance(x, DTensor):
        return None
    rows = by_unit and x.ndim > 1
    divided = [not p.is_replicate() and not (rows and getattr(p, "dim", None) == 0) for p in x.placements]
    placements = tuple(Partial() if d else Replicate() for d in divided)
    return (x.device_mesh, placements) if any(divided) else None


def _over_shards(norms: list[Tensor], tensors: Sequence[Tensor], by_unit: bool) -> list[Tensor]:
    together = defaultdict(list)
    for index, x in enumerate(tensors):
        reduction = _reduction(x, by_unit)
        if reduction is not None:
            together[reduction].append(index)
    for (mesh, placements), indices in together.items():
        squares = torch.cat([norms[i].reshape(-1) for i in indices]).square()
        sums = DTensor.from_local(squares, mesh, placements, run_check=False).full_tensor()
        parts = sums.sqrt().split_with_sizes([norms[i].numel() for i in indices])
        for i, part in zip(indices, parts, strict=True):
            norms[i] = part.view(norms[i].shape)
    return norms
