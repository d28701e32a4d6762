"""Layers that must not be clipped relative to their weights: those that start at zero, and the output layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_diffusion.norms import tensor_norms


def delicate_parameters(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[str]:
    """Names of zero parameters, of those in layers with a zero matrix, and in each optimizer's last layer.

    The last layer is the last one with a matrix, in the order of registration, that the optimizer holds. Reads
    from the device: call it once, before training.
    """
    named = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    zero = _zero(named)
    layers = {_layer(name) for name in zero if named[name].ndim > 1} | set(_last_layers(named, optimizers))
    return [name for name in named if name in zero or _layer(name) in layers]


def _zero(named: Mapping[str, Tensor]) -> set[str]:
    if not named:
        return set()
    zero = torch.stack(tensor_norms(list(named.values()))) == 0
    return {name for name, is_zero in zip(named, zero.tolist(), strict=True) if is_zero}


def _last_layers(named: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> Iterable[str]:
    for optimizer in optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        matrices = [name for name, p in named.items() if id(p) in held and p.ndim > 1]
        if matrices:
            yield _layer(matrices[-1])


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
