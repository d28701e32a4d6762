"""Components remember how they were made, so that a checkpoint loads without arguments and without pickle.

    spec(component) = {"class_path": shortest public path, "init_args": {name: plain data or spec}}

is what YAML would say, in numbers, strings, lists and dicts only: legal under torch.load(weights_only=True).
A LightningModule stores the specs of its components as hyperparameters, beside INSTANTIATOR. Then
`load_from_checkpoint(path)` rebuilds them, whether the command line or Python made them, and an instance
given there (`load_from_checkpoint(path, network=net)`) wins. What has no spec, such as a foreign nn.Module,
is `None`: leave it out of the hyperparameters, and it has to be given when loading.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

INSTANTIATOR = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}  # the one that Lightning trusts

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Recorded:
    """Base of classes whose constructor calls are recorded; of nested ones the outermost."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]


def spec(component: object) -> dict[str, Any] | None:
    """How to make `component` again: {"class_path", "init_args"}; None if plain data cannot say it."""
    try:
        return _call(component)
    except _UnrecordableError:
        return None


class _UnrecordableError(Exception):
    pass


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recording(self: object, *args: Any, **kwargs: Any) -> None:
        outermost = "_spec" not in self.__dict__
        self.__dict__["_spec"] = self.__dict__.get("_spec")
        init(self, *args, **kwargs)
        if outermost:
            self.__dict__["_spec"] = _recorded(self, signature.bind(self, *args, **kwargs))

    return recording


def _recorded(component: object, call: inspect.BoundArguments) -> dict[str, Any] | None:
    call.apply_defaults()
    (_, *names), values = call.signature.parameters, call.arguments
    if any(call.signature.parameters[name].kind in _VARIADIC and values[name] for name in names):
        return None
    named = {name: values[name] for name in names if call.signature.parameters[name].kind not in _VARIADIC}
    try:
        return _made(component, named)
    except _UnrecordableError:
        return None


def _call(component: object) -> dict[str, Any]:
    if isinstance(component, Recorded) and not is_dataclass(component):
        return _recorded_call(component)
    if is_dataclass(component) and not isinstance(component, type):
        return _made(component, {f.name: getattr(component, f.name) for f in fields(component) if f.init})
    raise _UnrecordableError


def _recorded_call(component: Recorded) -> dict[str, Any]:
    recorded: dict[str, Any] | None = component.__dict__.get("_spec")
    if recorded is None:
        raise _UnrecordableError
    return copy.deepcopy(recorded)


def _made(component: object, arguments: Mapping[str, object]) -> dict[str, Any]:
    init_args = {name: _plain(value) for name, value in arguments.items()}
    return {"class_path": public_path(type(component)), "init_args": init_args}


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return [_plain(item) for item in value]
    return _call(value)


def public_path(cls: type) -> str:
    """The shortest dotted path to `cls`: lightning_diffusion.EDM, not lightning_diffusion.presets.EDM."""
    for module in _prefixes(cls.__module__.split(".")):
        if getattr(sys.modules.get(module), cls.__name__, None) is cls:
            return f"{module}.{cls.__name__}"
    raise _UnrecordableError


def _prefixes(parts: list[str]) -> Iterable[str]:
    return (".".join(parts[: n + 1]) for n in range(len(parts)))
