"""Every operator that runs, by module: its types, its magnitudes and, where they matter, where its inputs came from."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from lightning_diffusion.analysis.magnitudes import FLOATS, Magnitudes
from lightning_diffusion.analysis.module_calls import Call, ModuleCalls
from lightning_diffusion.analysis.operator_table import CASTS, COMMUNICATION, CONSTANTS, LOW, VIEWS
from lightning_diffusion.analysis.seen import Note, low_buffers, of_loss, of_operator, of_output
from lightning_diffusion.analysis.tensor_lineage import Lineage, Mark, Origin

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_overrideable"}
_ELEMENTWISE_PRODUCTS = {"mul", "div"}


class Phase(StrEnum):
    """Of a training step."""

    FORWARD = "forward"
    BACKWARD = "backward"
    GRADIENTS = "gradients"  # clipping and what else looks at them
    OPTIMIZER = "optimizer"
    SAMPLING = "sampling"


class Operation(NamedTuple):
    """An operator of one kind in one place; types by name, in their order."""

    module: str
    phase: Phase
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records while it is active; what is computed does not change.

    Args:
        root: the module that is trained.
    """

    supports_higher_order_operators = True

    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: dict[Operation, Magnitudes] = {}
        self.changed_buffers: list[str] = []
        self.seen: dict[Note, Operation] = {}
        self.phase = Phase.FORWARD
        self._calls = ModuleCalls(root, self._note_output)
        self._lineage = Lineage()
        self._root, self._buffers = root, low_buffers(root)
        for p in root.parameters():
            self._lineage.mark(p, [Mark(Origin.PARAMETER)])

    def __enter__(self) -> Recorder:
        self._calls.watch()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._calls.stop()

    def note_loss(self, loss: Tensor) -> None:
        """Tell what backward begins with."""
        operation = Operation("", Phase.FORWARD, "loss", (), (_name(loss),))
        self._note(of_loss(loss, self._lineage), operation)

    def next_step(self) -> None:
        """Note buffers that the step has changed; free what nobody needs any longer."""
        before, self._buffers = self._buffers, low_buffers(self._root)
        self.changed_buffers = [name for name, state in self._buffers.items() if before.get(name) != state]
        self._lineage.forget()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(is_traceable_wrapper_subclass_type(t) for t in types):
            return NotImplemented
        output = func(*args, **(kwargs or {}))
        phase = self._phase()
        if phase is not Phase.OPTIMIZER:
            self._calls.note_node()
            self._record(phase, func, args, kwargs or {}, output)
        return output

    def _phase(self) -> Phase:
        if self._calls.in_backward:
            return Phase.BACKWARD
        if self._calls.current.number:
            return Phase.SAMPLING if self.phase is Phase.SAMPLING else Phase.FORWARD
        if _in_optimizer():
            self.phase = Phase.FORWARD
            return Phase.OPTIMIZER
        return self.phase

    def _record(
        self, phase: Phase, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        operator = operator_name(func)
        if operator in VIEWS or operator.partition("::")[0] in COMMUNICATION:
            return
        inputs, outputs = _floats((args, kwargs)), _floats(output)
        if not outputs:
            return
        place = self._place(phase, operator, inputs, outputs)
        magnitudes = self.operations.setdefault(place, Magnitudes())
        magnitudes.calls += 1
        finite = [magnitudes.add(x) for x in outputs]
        if (
            not all(finite)
            and operator not in CONSTANTS
            and all(_finite(x) for x in _untouched(inputs, outputs))
        ):
            magnitudes.overflows += 1
        magnitudes.reduced = max(magnitudes.reduced, _reduced(operator, args, inputs, outputs))
        self._count_flushed(magnitudes, operator, inputs, outputs)
        if place.phase is not Phase.BACKWARD:
            for note in of_operator(operator, args, inputs, outputs, self._lineage, self._calls.current):
                self._note(note, place)
            self._lineage.follow(operator, place.module, inputs, outputs)

    def _place(
        self, phase: Phase, operator: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> Operation:
        types = tuple(dict.fromkeys(map(_name, inputs)))
        return Operation(self._calls.path, phase, operator, types, tuple(map(_name, outputs[:4])))

    def _count_flushed(
        self, magnitudes: Magnitudes, operator: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Casts but for those of weights and probabilities, which may be small; products."""
        if len(outputs) != 1 or _name(outputs[0]) not in LOW or not inputs:
            return
        (after,) = outputs
        if operator in CASTS and not self._may_be_small(inputs[-1]) and inputs[-1].shape == after.shape:
            magnitudes.add_flushed(inputs[-1] != 0, after)
        elif operator in _ELEMENTWISE_PRODUCTS and after.data_ptr() not in {x.data_ptr() for x in inputs}:
            factors = inputs if operator == "mul" else inputs[:1]
            magnitudes.add_flushed(_all_nonzero(factors).expand(after.shape), after)
        elif operator in _PRODUCTS and not bool(after.any()) and all(bool(x.any()) for x in inputs[-2:]):
            magnitudes.add_flushed(torch.ones_like(after, dtype=torch.bool), after)

    def _may_be_small(self, x: Tensor) -> bool:
        origins = {mark.origin for mark in self._lineage.of(x)}
        return bool(origins & {Origin.PARAMETER, Origin.PROBABILITY})

    def _note(self, note: Note | None, operation: Operation) -> None:
        if note is not None:
            self.seen.setdefault(note, operation)

    def _note_output(self, call: Call, inputs: tuple[Any, ...], output: Any) -> None:
        if self._calls.in_backward:
            return
        for x in _floats(output):
            types = tuple(map(_name, _floats(inputs)))
            operation = Operation(call.path, self.phase, "output", types, (_name(x),))
            self._note(of_output(call, _floats(inputs), x), operation)
            if _name(x) in LOW and (call.caller == 0 or call.has_parts):
                self._lineage.mark(x, [Mark(Origin.OUTPUT, call.path, _name(x), call.caller)])


def _in_optimizer() -> bool:
    """Whether an optimizer's own arithmetic is running; the closure within its step belongs to Lightning."""
    frame = sys._getframe(3)
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).split(".")
        if package[0] in ("lightning", "pytorch_lightning", "lightning_diffusion") or package[:2] == [
            "torch",
            "optim",
        ]:
            return package[0] == "torch"
        frame = frame.f_back  # type: ignore[assignment]
    return False


def operator_name(func: Any) -> str:
    """aten operators without the underscore of in-place forms; others as namespace::name."""
    full = getattr(getattr(func, "_schema", None), "name", None) or f"higher_order::{func}"
    namespace, _, name = full.partition("::")
    if namespace != "aten":
        return full
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _floats(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _finite(x: Tensor) -> bool:
    return x.dtype not in FLOATS or bool(x.isfinite().all())


def _untouched(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs that were not written over."""
    written = {x.data_ptr() for x in outputs}
    return [x for x in inputs if x.data_ptr() not in written]


def _all_nonzero(factors: Sequence[Tensor]) -> Tensor:
    nonzero = factors[0] != 0
    for x in factors[1:]:
        nonzero = nonzero & (x != 0)
    return nonzero


def _reduced(
    operator: str, args: tuple[Any, ...], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> float:
    """Elements that one output sums up."""
    if not inputs or not outputs or not outputs[0].numel():
        return 1
    if operator in ("cumsum", "cumprod"):
        return inputs[0].shape[args[1]] if inputs[0].ndim else 1
    return inputs[0].numel() / outputs[0].numel()
