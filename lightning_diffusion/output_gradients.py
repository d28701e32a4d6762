"""Gradients of the loss with respect to a network's output, as backward leaves them there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class OutputGradients:
    """Keeps the gradients at the outputs of a network's calls, one tensor each: no copies, nothing computed."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._handle: RemovableHandle | None = None

    def watch(self, network: Any) -> None:
        """Look at the outputs of a module from now on; anything else has none."""
        self.leave()
        if isinstance(network, nn.Module):
            self._handle = network.register_forward_hook(self._hook)

    def leave(self) -> None:
        """Look no more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self.forget()

    def forget(self) -> None:
        """A new micro-batch begins."""
        self._found = []

    def pop(self, samples: int, scaler: Any = None) -> Tensor | None:
        """The gradient (samples, ...), the loss scale divided out; None unless one call had that many samples."""
        found, self._found = self._found, []
        if len(found) != 1 or found[0].ndim < 2 or len(found[0]) != samples:
            return None
        return found[0] if scaler is None else found[0].float() / scaler._get_scale_async()

    def _hook(self, network: nn.Module, arguments: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._found.append)  # type: ignore[no-untyped-call]
