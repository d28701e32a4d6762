"""Which types every operator of a module's step computes in."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Collects (innermost module's name, operator) -> types of its floating-point tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.types: dict[tuple[str, str], set[torch.dtype]] = defaultdict(set)
        self.inside = [""]
        for name, part in module.named_modules():
            part.register_forward_pre_hook(lambda *_, name=name: self.inside.append(name))
            part.register_forward_hook(lambda *_: self.inside.pop() and None, always_call=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ("_to_copy", "detach", "to", "copy_"):
            leaves = [
                x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()
            ]
            self.types[self.inside[-1], name] |= {x.dtype for x in leaves}
        return func(*args, **(kwargs or {}))

    def of(self, operator: str, within: str = "") -> set[torch.dtype]:
        """All types that an operator saw in modules whose names contain a word."""
        found = [t for (name, op), t in self.types.items() if operator in op and within in name]
        return set().union(*found)
