"""What is wrong with a step but not with one operator alone: seen by where its inputs came from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_diffusion.analysis.module_calls import Call
from lightning_diffusion.analysis.operator_table import (
    ANGLE,
    DECODER,
    GUIDANCE,
    LOSS,
    LOW,
    RUNNING,
    SCORES,
    SOFTMAX,
    Rule,
    rule_of,
)
from lightning_diffusion.analysis.tensor_lineage import Lineage, Mark, Origin


class Note(NamedTuple):
    """A rule that is broken, the module to name, and the type at fault."""

    rule: Rule
    module: str
    dtype: str


_BLURRED_ANGLE = 0.01  # radians by which rounding may turn a cosine
_IMAGE_CHANNELS = 4


def of_operator(
    operator: str,
    args: Sequence[Any],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    lineage: Lineage,
    call: Call,
) -> Iterator[Note]:
    """What an operator's inputs give away."""
    marks = {mark for x in inputs for mark in lineage.of(x)}
    if rule_of(operator) is SOFTMAX or operator in ("exp", "logsumexp"):
        yield from (Note(SCORES, mark.module, mark.dtype) for mark in marks if mark.origin is Origin.PRODUCT)
    if rule_of(operator) is ANGLE and outputs and _name(outputs[0]) not in LOW:
        rounded = [mark for mark in marks if mark.origin is Origin.ROUNDED]
        yield from (Note(ANGLE, m.module, m.dtype) for m in rounded if _is_blurred(inputs[0], m.dtype))
    if operator in ("sub", "rsub", "lerp", "add") and outputs and _name(outputs[0]) in LOW:
        yield from (
            Note(GUIDANCE, call.path, m.dtype) for m in _shared_output(operator, inputs, lineage, call)
        )
    if "batch_norm" in operator:
        held = [_name(x) for x in args[3:5] if isinstance(x, Tensor)]
        yield from (Note(RUNNING, call.path, name) for name in held[:1] if name in LOW)


def of_output(call: Call, inputs: Sequence[Tensor], output: Tensor) -> Note | None:
    """A decoder's output: an image, larger than what it was made of, or of a module that is called a decoder."""
    if _name(output) not in LOW or output.ndim != 4 or output.shape[1] > _IMAGE_CHANNELS:
        return None
    own = f"{call.path.rpartition('.')[2]} {type(call.module).__name__}"
    enlarged = (
        bool(inputs) and inputs[0].ndim == 4 and output.shape[-1] > inputs[0].shape[-1] and call.caller == 0
    )
    return (
        Note(DECODER, call.path, _name(output))
        if enlarged or re.search("decod", own, re.IGNORECASE)
        else None
    )


def of_loss(loss: Tensor, lineage: Lineage) -> Note | None:
    """A loss in 16 bits, or one that was summed up in them."""
    summed = [mark.dtype for mark in lineage.of(loss) if mark.origin is Origin.REDUCED]
    low = [_name(loss)] if _name(loss) in LOW else summed
    return Note(LOSS, "", low[0]) if low else None


def _shared_output(operator: str, inputs: Sequence[Tensor], lineage: Lineage, call: Call) -> list[Mark]:
    """Outputs of one module, called here, on both sides; a sum only of scaled ones."""
    if len(inputs) < 2:
        return []
    sides = [
        {m for m in lineage.of(x) if m.origin in (Origin.OUTPUT, Origin.SCALED_OUTPUT)} for x in inputs[:2]
    ]
    modules = [{(m.module, m.caller): m for m in side} for side in sides]
    shared = [modules[0][key] for key in modules[0].keys() & modules[1].keys()]
    scaled = {m.module for side in sides for m in side if m.origin is Origin.SCALED_OUTPUT}
    here = [m for m in shared if m.caller == call.number and inputs[0].numel() > 1]
    return [m for m in here if operator != "add" or m.module in scaled]


def _is_blurred(angles: Tensor, dtype: str) -> bool:
    error = angles.detach().abs().max() * torch.finfo(LOW[dtype]).eps / 2
    return bool(error >= _BLURRED_ANGLE)


def low_buffers(root: nn.Module) -> dict[str, tuple[int, int]]:
    """Buffers in 16 bits, by name, as something that changes when they do."""
    return {name: (b.data_ptr(), b._version) for name, b in root.named_buffers() if _name(b) in LOW}


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
