"""Count what would make the host wait for the accelerator, on a machine that has none.

Reading a number (`.item()`, `bool()`, `float()`) and shapes that depend on data (`nonzero`, boolean masks)
are seen as operators; `.tolist()`, `.numpy()`, `.cpu()` and printing, which read CPU memory directly, as
Python calls.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATORS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "allclose",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
}
_CALLS = {"tolist", "numpy", "cpu", "__repr__", "__array__", "__format__"}


class SyncCounter:
    """Collects in `calls` the synchronisations inside a `with` block, in `ours` those of this package."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.ours: list[str] = []
        self._modes = (_Operators(self), _Calls(self))

    def note(self, name: str) -> None:
        place = _place_in_package()
        self.calls.append(name)
        if place:
            self.ours.append(f"{name} at {place}")

    def __enter__(self) -> SyncCounter:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


class _Operators(TorchDispatchMode):
    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _OPERATORS or (name in {"index", "index_put_"} and _has_mask(args)):
            self.counter.note(name)
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _CALLS:
            self.counter.note(func.__name__)
        return func(*args, **(kwargs or {}))


def _has_mask(args: tuple[Any, ...]) -> bool:
    return any(
        isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] or () if i is not None
    )


def _place_in_package() -> str | None:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("lightning_diffusion"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None
