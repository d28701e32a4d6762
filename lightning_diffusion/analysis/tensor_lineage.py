"""Where tensors come from: marks that travel with values through copies and arithmetic, to what they end in.

A mark belongs to memory, so that all views of a tensor have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_diffusion.analysis.operator_table import (
    COPIES,
    LOSS,
    LOW,
    PRODUCTS,
    REDUCTION,
    SOFTMAX,
    rule_of,
)


class Origin(StrEnum):
    """What a value has been."""

    PARAMETER = "parameter"
    PRODUCT = "product"  # in 16 bits, of two activations
    REDUCED = "reduced"  # to 16 bits
    ROUNDED = "rounded"  # to 16 bits, and is float32 again
    OUTPUT = "output"  # of a module
    SCALED_OUTPUT = "scaled output"
    PROBABILITY = "probability"


class Mark(NamedTuple):
    """An origin, the module where it was, its type, and for outputs the call that the module was called in."""

    origin: Origin
    module: str = ""
    dtype: str = ""
    caller: int = 0


ARITHMETIC = {
    *(
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "neg",
        "abs",
        "clamp",
        "clamp_min",
        "clamp_max",
        "maximum",
        "minimum",
        "lerp",
    ),
    *(
        "addcmul",
        "addcdiv",
        "reciprocal",
        "pow",
        "exp",
        "exp2",
        "log",
        "sqrt",
        "rsqrt",
        "tanh",
        "sigmoid",
        "sin",
        "cos",
    ),
    *("logsumexp", "amax", "max"),
}
_REDUCTIONS = {
    "sum",
    "mean",
    "nanmean",
    "amax",
    "logsumexp",
    "var",
    "std",
    "linalg_vector_norm",
    "norm",
    "prod",
}
_THROUGH_ARITHMETIC = {Origin.PRODUCT, Origin.REDUCED, Origin.ROUNDED}
NONE: frozenset[Mark] = frozenset()


class Lineage:
    """Marks by memory."""

    def __init__(self) -> None:
        self._marks: dict[int, tuple[StorageWeakRef, frozenset[Mark]]] = {}

    def of(self, x: Tensor) -> frozenset[Mark]:
        """The marks of a tensor."""
        return self._marks.get(_storage(x)._cdata, (None, NONE))[1]

    def mark(self, x: Tensor, marks: Iterable[Mark]) -> None:
        """Add marks."""
        marks = frozenset(marks)
        if marks:
            storage = _storage(x)
            self._marks[storage._cdata] = (StorageWeakRef(storage), self.of(x) | marks)  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Free what nobody holds."""
        expired = [key for key, (memory, _) in self._marks.items() if memory.expired()]  # type: ignore[no-untyped-call]
        for key in expired:
            del self._marks[key]

    def follow(self, operator: str, module: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Marks of an operator's outputs, from its inputs, all of them floating-point."""
        marks = set(self._inherited(operator, inputs))
        if _low(inputs) and not _low(outputs) and (operator in COPIES or operator in ARITHMETIC):
            marks.add(Mark(Origin.ROUNDED, module, _name(_low(inputs)[0])))
        if low := _low(outputs):
            if operator in PRODUCTS and not self._of_parameters(operator, inputs):
                marks.add(Mark(Origin.PRODUCT, module, _name(low[0])))
            if rule_of(operator) in (REDUCTION, LOSS):
                marks.add(Mark(Origin.REDUCED, module, _name(low[0])))
        if rule_of(operator) is SOFTMAX:
            marks.add(Mark(Origin.PROBABILITY))
        for x in outputs:
            self.mark(x, marks)

    def _inherited(self, operator: str, inputs: Sequence[Tensor]) -> set[Mark]:
        if not inputs:
            return set()
        before = [self.of(x) for x in inputs]
        marks = set().union(*before)
        if operator in COPIES:
            return marks
        if operator in ARITHMETIC:
            kept = {mark for mark in marks if mark.origin in _THROUGH_ARITHMETIC}
            kept |= {m for m in frozenset.intersection(*before) if m.origin is Origin.PARAMETER}
            return kept | (
                self._scaled(marks) if operator in ("mul", "div") and _by_number(inputs) else set()
            )
        if operator in _REDUCTIONS:
            return {mark for mark in marks if mark.origin is Origin.REDUCED}
        return set()

    def _scaled(self, marks: set[Mark]) -> set[Mark]:
        outputs = {m for m in marks if m.origin in (Origin.OUTPUT, Origin.SCALED_OUTPUT)}
        return {m._replace(origin=Origin.SCALED_OUTPUT) for m in outputs}

    def _of_parameters(self, operator: str, inputs: Sequence[Tensor]) -> bool:
        """Linear layers; a product of three dimensions is one of activations, with learned queries too."""
        parameter = Mark(Origin.PARAMETER)
        return operator in ("mm", "addmm") and any(parameter in self.of(x) for x in inputs)


def _by_number(inputs: Sequence[Tensor]) -> bool:
    """Whether one tensor is scaled, all of it or each sample."""
    *small, large = sorted(inputs, key=Tensor.numel)
    return large.ndim > 0 and all(x.numel() <= len(large) for x in small)


def _storage(x: Tensor) -> UntypedStorage:
    return x.untyped_storage()


def _low(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in tensors if _name(x) in LOW]


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
