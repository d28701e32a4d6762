"""Other weights in a module for a while.

The module's own (online) weights are kept bit for bit and put back; while others are in, its `state_dict`
still gives the online ones, so that whatever is saved meanwhile holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle

from lightning_diffusion.averaging import local


def placed_like(weight: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor, sharded as `parameter` is."""
    if isinstance(parameter, DTensor) and not isinstance(weight, DTensor):
        weight = weight.to(parameter.device)
        return distribute_tensor(weight, parameter.device_mesh, parameter.placements)
    return weight


class Swap:
    """Puts weights into a module by parameter name, and takes them out again.

    Args:
        module: whose parameters change, in place: compiled networks are not compiled again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.current: Mapping[str, Tensor] | None = None
        self._online: dict[str, Tensor] = {}
        self._hook: RemovableHandle | None = None

    def put(self, weights: Mapping[str, Tensor] | None) -> None:
        """Let the module compute with `weights`; None is its own."""
        if weights is self.current:
            return
        parameters = self._parameters()
        self._copy(self._online, parameters)
        self._online = {}
        if weights is not None:
            _check_names(weights, parameters)
            self._keep({name: parameters[name] for name in weights})
            self._copy(weights, parameters)
        self.current = weights
        self._watch(weights is not None)

    def _parameters(self) -> dict[str, Tensor]:
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        return dict(self.module.named_parameters())

    def _keep(self, parameters: Mapping[str, Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._online = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def _copy(self, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        sources = [local(placed_like(weight, parameters[name])) for name, weight in weights.items()]
        if sources:
            torch._foreach_copy_([local(parameters[name]) for name in weights], sources)

    def _watch(self, swapped: bool) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        if swapped:
            register = self.module.register_state_dict_post_hook
            self._hook = register(lambda *args: self._give_online(*args))  # type: ignore[no-untyped-call]

    def _give_online(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: object) -> None:
        if module is not self.module:
            return
        names = {parameter: name for name, parameter in module.named_parameters()}
        for alias, parameter in module.named_parameters(remove_duplicate=False):
            if prefix + alias in state_dict and names[parameter] in self._online:
                state_dict[prefix + alias] = self._online[names[parameter]]


def _check_names(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    strange = [name for name in weights if name not in parameters]
    if strange:
        raise ValueError(
            f"Averaged weights {strange[:3]} belong to no parameter of this network, which has "
            f"{list(parameters)[:3]}, ...: they are of another network; load its own checkpoint."
        )
    for name, weight in weights.items():
        if weight.shape != parameters[name].shape:
            raise ValueError(
                f"The averaged weight {name!r} has shape {tuple(weight.shape)}, the network's own "
                f"{tuple(parameters[name].shape)}: they are of another network; load its own checkpoint."
            )


@contextmanager
def swapped_in(module: nn.Module, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Compute with `weights` inside the block, with the module's own again afterwards, whatever happens."""
    swap = Swap(module)
    swap.put(weights)
    try:
        yield
    finally:
        swap.put(None)


class Swapping(nn.Module):
    """A sharded network called with other values for its parameters, which are put in for every call.

    Args:
        network: sharded by FSDP2, which gathers its own parameters whatever stands in for them.
        values: parameter name (as in the network's named_parameters) to tensor.
    """

    def __init__(self, network: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._network = [network]
        own = dict(network.named_parameters())
        self._values = {name: placed_like(value, own[name]) for name, value in values.items()}

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self._network[0].parameters(recurse)

    def forward(self, *args: Tensor, **condition: Tensor) -> Tensor:
        with swapped_in(self._network[0], self._values):
            output: Tensor = self._network[0](*args, **condition)
        return output
