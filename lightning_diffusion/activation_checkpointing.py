"""Activation checkpointing per block: keep a block's inputs, compute the rest again in the backward pass.

Chen et al. 2016: memory for activations falls to the blocks' inputs and one block's inside, for one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputed:
    """A forward that keeps its inputs only while gradients are wanted."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.__wrapped__ = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.__wrapped__, *args, use_reentrant=False, **kwargs)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """What a network is a stack of: the members of its lists, and its other children of the same classes.

    Of a network without lists, all children.
    """
    lists = [child for child in network.children() if isinstance(child, (nn.ModuleList, nn.Sequential))]
    members = [member for modules in lists if isinstance(modules, nn.ModuleList) for member in modules]
    kinds = tuple({type(member) for member in members}) or (nn.Module,)
    return list(_distinct([*members, *(child for child in network.children() if isinstance(child, kinds))]))


def checkpoint_blocks_(network: nn.Module, blocks: Sequence[nn.Module] | None = None) -> None:
    """Let blocks compute their insides again in the backward pass; names and parameters stay.

    Under `DiffusionPrecision` too, before or after it is in place; twice is the same as once.

    Args:
        network: changed in place.
        blocks: which; those of `blocks_of` if not given.

    Raises:
        ValueError: if there are none.
    """
    chosen = blocks_of(network) if blocks is None else list(blocks)
    if not chosen:
        raise ValueError(
            f"Found no blocks in {type(network).__name__}; give the modules to compute again as blocks."
        )
    for block in chosen:
        if not isinstance(block.forward, Recomputed):
            block.forward = Recomputed(block.forward)


def _distinct(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    return iter({id(module): module for module in modules}.values())
