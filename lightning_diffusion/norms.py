"""Euclidean norms of tensors and gradients, whole or unit by unit, sharded or not.

    unit    all elements with one index along the first axis: an output channel; vectors and scalars are one unit
    shard   what one process holds of a DTensor; norms are those of the whole tensor

Norms are float32 at least. Those of shards need one all-reduce per device mesh for all tensors together, and
none where units are not divided. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

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


def largest_magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """Largest absolute value in every tensor's local shard, shape (len(tensors),)."""
    return torch.stack(torch._foreach_norm(list(tensors), torch.inf))


class Gradients:
    """The gradients of some parameters; their norms are computed once, for all that ask.

    Whoever changes gradients in place has to call `forget`; the rules here do.

    Args:
        groups: parameters by optimizer group; those that have no gradient are left out.

    Raises:
        ValueError: a gradient is sparse.
    """

    def __init__(self, groups: Iterable[Iterable[Tensor]]) -> None:
        self.groups = [[p for p in group if _has_gradient(p)] for group in groups]
        self.parameters = [p for group in self.groups for p in group]
        self._norms: dict[int, Tensor] = {}
        self._totals: dict[tuple[int, ...], Tensor] = {}

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def tensors(self) -> list[Tensor]:
        """The gradients, this process's shards."""
        return [local(g) for g in self.whole]

    @property
    def whole(self) -> list[Tensor]:
        """The gradients, DTensors where parameters are."""
        return [p.grad for p in self.parameters if p.grad is not None]

    @property
    def norms(self) -> list[Tensor]:
        """Norm () of each parameter's gradient, over all shards."""
        unknown = [p for p in self.parameters if id(p) not in self._norms]
        if unknown:
            fresh = tensor_norms([p.grad for p in unknown if p.grad is not None])
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

    def _sharing(self, groups: Sequence[Sequence[Tensor]]) -> Gradients:
        part = Gradients(groups)
        part._norms, part._totals = self._norms, self._totals
        return part

    def forget(self) -> None:
        """Compute norms anew when they are next asked for."""
        self._norms.clear()
        self._totals.clear()


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
    vectors = _local_norms([x for x in ordered if x.ndim < 2])
    together = [torch.stack(vectors)] if vectors else []
    return together + [_row_norms(x) for x in ordered if x.ndim > 1]


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
