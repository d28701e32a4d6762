"""Contexts (N, T, D) for networks with cross-attention, which draw nothing of meaning without one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_diffusion.batches import CONTEXT, LABEL, declared_conditions, unpack


def takes_context(module: Any) -> bool:
    """Whether a module's network attends to embeddings: it says so, or its `forward` has a keyword for them."""
    network = getattr(module, "network", None)
    if network is None:
        return False
    return bool(getattr(network, "context_dim", CONTEXT in declared_conditions(network)))


def refuse_context(module: Any, who: str, remedy: str) -> None:
    """Refuse to draw without the context that a module's network was trained with.

    Args:
        module: any.
        who: draws, such as `evaluate`.
        remedy: what to do instead.

    Raises:
        ValueError: if the network has cross-attention.
    """
    if takes_context(module):
        raise ValueError(
            f"{who} draws without context, but {type(module.network).__name__} attends to one: samples would be those "
            f"of no context at all. {remedy}"
        )


def first_conditions(loaders: Iterable[Any], module: Any, number: int) -> dict[str, Tensor]:
    """Contexts (n, T, D), and labels (n,) where the network has classes, of the first samples that loaders yield.

    Args:
        loaders: gone through in order.
        module: whose network attends to contexts.
        number: at most so many; fewer where batches end, or where contexts come to be of another length T.

    Returns:
        nothing where the first batch has no context.
    """
    names = [CONTEXT, *([LABEL] if getattr(module, "num_classes", 0) else [])]
    found: list[dict[str, Tensor]] = []
    for batch in chain.from_iterable(loaders):
        condition = unpack(batch)[1]
        few = {name: condition[name][:number] for name in names if name in condition}
        if CONTEXT not in few or (found and not _alike(few, found[0])):
            break
        found.append(few)
        if sum(len(part[CONTEXT]) for part in found) >= number:
            break
    return {name: torch.cat([part[name] for part in found])[:number] for name in (found[0] if found else ())}


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and one[CONTEXT].shape[1:] == other[CONTEXT].shape[1:]
