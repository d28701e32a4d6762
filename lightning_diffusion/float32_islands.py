"""Modules that compute in float32 inside of a network that runs in low precision, and the doors to that network.

A door turns autocast on for one module; an island turns it off and takes what it is given as float32. Both stand in
for the module's forward in place until they are removed: no parameter, name or class changes, and deep copies,
pickles, torch.compile and activation checkpointing follow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.loss import _Loss
from torch.utils._pytree import tree_map_only

from lightning_diffusion.networks.embeddings import NoiseEmbedding

NORMALISATIONS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)
ALWAYS_FLOAT32 = (
    *NORMALISATIONS,
    nn.Softmax,
    nn.Softmax2d,
    nn.Softmin,
    nn.LogSoftmax,
    _Loss,
    NoiseEmbedding,
)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class Door:
    """A forward under autocast."""

    def __init__(self, forward: Callable[..., Any], device_type: str, dtype: torch.dtype) -> None:
        self.__wrapped__, self.device_type, self.dtype = forward, device_type, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, self.dtype, cache_enabled=False):
            return self.__wrapped__(*args, **kwargs)


class Island:
    """A forward in float32.

    Args:
        forward: the module's own.
        device_type: of autocast.
        hands_back: give the output the type of the first input, where only what is in between needs float32.
    """

    def __init__(self, forward: Callable[..., Any], device_type: str, hands_back: bool) -> None:
        self.__wrapped__, self.device_type, self.hands_back = forward, device_type, hands_back

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raised_args, raised_kwargs = tree_map_only(Tensor, _raised, (args, kwargs))
        with torch.autocast(self.device_type, enabled=False):
            output = self.__wrapped__(*raised_args, **raised_kwargs)
        if self.hands_back and args and isinstance(output, Tensor):
            return output.to(args[0].dtype)
        return output


def _raised(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Precisions:
    """Doors and islands in place, and parameters in low precision, all of which `remove` takes back.

    Args:
        device_type: of autocast.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self._undo: list[Callable[[], None]] = []

    def open(self, door: nn.Module, dtype: torch.dtype) -> None:
        """Run a module under autocast."""
        self._replace(door, Door(door.forward, self.device_type, dtype))

    def raise_(self, island: nn.Module) -> None:
        """Run a module in float32; normalisations hand back the type that they were given."""
        hands_back = isinstance(island, NORMALISATIONS)
        self._replace(island, Island(island.forward, self.device_type, hands_back))

    def lower(self, roots: Iterable[nn.Module], islands: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Keep float32 parameters and buffers in low precision, but not those of islands."""
        islands = list(islands)
        kept = {id(p) for island in islands for p in island.parameters()}
        dry = {id(module) for island in islands for module in island.modules()}
        for module in _distinct(m for root in roots for m in root.modules() if id(m) not in dry):
            for p in module.parameters(recurse=False):
                if p.dtype is torch.float32 and id(p) not in kept:
                    self._convert_parameter(p, dtype)
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype is torch.float32:
                    self._convert_buffer(module, name, dtype)

    def remove(self) -> None:
        """Everything as it was before; what was rounded stays rounded."""
        while self._undo:
            self._undo.pop()()

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        before = module.__dict__.get("forward")
        module.forward = forward
        self._undo.append(lambda: _put_back(module, forward, before))

    def _convert_parameter(self, p: nn.Parameter, dtype: torch.dtype) -> None:
        before = p.dtype
        _cast_(p, dtype)
        self._undo.append(lambda: _cast_(p, before))

    def _convert_buffer(self, module: nn.Module, name: str, dtype: torch.dtype) -> None:
        before = module._buffers[name]
        module._buffers[name] = None if before is None else before.to(dtype)
        self._undo.append(lambda: _raise_buffer(module, name))


def _put_back(module: nn.Module, forward: Callable[..., Any], before: Callable[..., Any] | None) -> None:
    if module.__dict__.get("forward") is not forward:
        return  # somebody else has replaced it since
    if before is None:
        del module.forward
    else:
        module.forward = before


def _cast_(p: nn.Parameter, dtype: torch.dtype) -> None:
    gradient, p.grad = p.grad, None
    p.data = p.data.to(dtype)
    p.grad = None if gradient is None else gradient.to(dtype)


def _raise_buffer(module: nn.Module, name: str) -> None:
    buffer = module._buffers[name]
    module._buffers[name] = None if buffer is None else buffer.float()


def find_islands(
    module: nn.Module, patterns: Sequence[str], within: Collection[nn.Module] = ()
) -> dict[str, nn.Module]:
    """Outermost modules that compute in float32, by name.

    Those whose names fit a pattern anywhere; and in `within` (in everything, if it is empty) normalisations, softmax,
    losses, noise embeddings, and what a network itself names in `float32_modules`.

    Raises:
        ValueError: for a pattern that fits no module.
    """
    named = dict(_named(module))
    searched = {id(m) for root in within or [module] for m in root.modules()}
    found: dict[str, nn.Module] = {
        n: m for n, m in named.items() if isinstance(m, ALWAYS_FLOAT32) and id(m) in searched
    }
    for name, network in [("", module), *named.items()]:
        declared = getattr(network, "float32_modules", ())
        if declared and id(network) in searched:
            prefix = f"{name}." if name else ""
            found |= _matching(named, [prefix + pattern for pattern in declared], type(network).__name__)
    found |= _matching(named, patterns, "fp32_modules")
    return _outermost(found)


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules(remove_duplicate=False):
        if name and not name.endswith("_orig_mod"):
            yield name.replace("_orig_mod.", ""), part


def _matching(named: Mapping[str, nn.Module], patterns: Sequence[str], where: str) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        fitting = {name: part for name, part in named.items() if fnmatch(name, pattern)}
        if not fitting:
            raise ValueError(
                f"{where}: no module is called {pattern!r}{_nearest(pattern, named)} Write a name as in "
                "named_modules(), such as 'network.head', or a pattern such as '*.attention'."
            )
        for name, part in fitting.items():
            found |= _callable(name, part)
    return found


def _nearest(pattern: str, named: Mapping[str, nn.Module]) -> str:
    near = get_close_matches(pattern.strip("*."), list(named), n=3, cutoff=0.5)
    return f"; the nearest are {near}." if near else f"; the first of {len(named)} are {list(named)[:3]}."


def _callable(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """The module, or the members of a list of modules, which nobody calls itself."""
    if not isinstance(module, _CONTAINERS):
        return {name: module}
    members = (_callable(f"{name}.{key}", member) for key, member in module.named_children())
    return {key: part for found in members for key, part in found.items()}


def _outermost(found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    inner = {id(part) for island in found.values() for part in island.modules() if part is not island}
    distinct = {id(island): name for name, island in reversed(list(found.items())) if id(island) not in inner}
    return {name: island for name, island in found.items() if distinct.get(id(island)) == name}


def _distinct(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    return iter({id(module): module for module in modules}.values())
