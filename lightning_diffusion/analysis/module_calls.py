"""Which module an operator belongs to, forward and backward.

Forward: the innermost module that is being called. Backward: the module whose forward made the graph's node, found by
the number that autograd gives each node. What is computed again in backward (activation checkpointing) is forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

OUTSIDE = -1  # of backward


@dataclass(frozen=True)
class Call:
    """One call of a module; number 0 is outside of all modules.

    Args:
        path: as in named_modules of the root; that of the nearest module which has one.
        module: None outside.
        number: no other call has it.
        caller: number of the call that it was made in.
        backward: of autograd, OUTSIDE of it.
    """

    path: str = ""
    module: nn.Module | None = None
    number: int = 0
    caller: int = 0
    backward: int = OUTSIDE

    @property
    def has_parts(self) -> bool:
        """Whether the module is made of others."""
        return self.module is not None and any(True for _ in self.module.children())


class ModuleCalls:
    """Follows the calls of all modules while it is watching.

    Args:
        root: gives modules their names.
        on_output: told (call, inputs, output) of each call that has ended.
    """

    def __init__(self, root: nn.Module, on_output: Callable[[Call, tuple[Any, ...], Any], None]) -> None:
        self._paths = {id(module): _plain(name) for name, module in reversed(list(root.named_modules()))}
        self._on_output = on_output
        self._stack = [Call()]
        self._made: dict[int, str] = {}
        self._number = 0
        self._handles: list[Any] = []

    @property
    def current(self) -> Call:
        """The innermost call."""
        return self._stack[-1]

    @property
    def in_backward(self) -> bool:
        """Whether autograd is computing gradients, and not a forward again."""
        task = torch._C._current_graph_task_id()
        return task != OUTSIDE and self.current.backward != task

    @property
    def path(self) -> str:
        """The module that what is computed now belongs to."""
        if not self.in_backward:
            return self.current.path
        node = torch._C._current_autograd_node()
        return self._made.get(node._sequence_nr(), "") if node is not None else ""

    def note_node(self) -> None:
        """An operator was called: autograd has just made its node, if it needs one."""
        if not self.in_backward:
            self._made.setdefault(torch.autograd._get_sequence_nr() - 1, self.current.path)  # type: ignore[attr-defined]

    def watch(self) -> None:
        """Begin to follow calls."""
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Follow no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._stack, self._made = [], [Call()], {}

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._number += 1
        path = self._paths.get(id(module), self.current.path)
        task = torch._C._current_graph_task_id()
        self._stack.append(Call(path, module, self._number, self.current.number, task))

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        while len(self._stack) > 1:
            call = self._stack.pop()
            if call.module is module:
                self._on_output(call, inputs, output)
                return


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")
