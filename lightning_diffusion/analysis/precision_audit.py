"""What ran in which number format, and what of it should have been float32.

A recorder (operator_recorder.py) has watched a few training steps; here its operations are held against the table
(operator_table.py), in the forward and between backward and optimizer. In backward, where autograd computes what the
forward asks for, only magnitudes are judged: under dynamic loss scaling overflow is part of the plan there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_diffusion.analysis import operator_table as table
from lightning_diffusion.analysis.magnitudes import Magnitudes
from lightning_diffusion.analysis.operator_recorder import Operation, Phase, Recorder
from lightning_diffusion.analysis.operator_table import LOW, Rule
from lightning_diffusion.analysis.precision_report import OperatorRecord, PrecisionReport, Verdict

NEAR = 1 / 4
"""Share of a format's largest number from which values are close to it."""

FLUSHED = 0.1
"""Share of values that a cast may lose in the forward; in backward half of them."""

_ASLEEP = 1e-4


class Audit:
    """Watches the steps of a training; use it as a context around them.

    Args:
        root: the module that is trained.
        precision: of the Trainer, such as bf16-mixed.
    """

    def __init__(self, root: nn.Module, precision: str) -> None:
        self.recorder, self.precision = Recorder(root), precision
        self._root = root
        self._scaled = False
        self._optimizers: list[Optimizer] = []

    def note_loss(self, loss: Tensor, scaled: bool) -> None:
        """What backward begins with, and whether a loss scaler has multiplied it."""
        self._scaled = scaled
        self.recorder.note_loss(loss)

    def next_step(self, optimizers: Sequence[Optimizer]) -> None:
        """A batch is done."""
        self._optimizers = list(optimizers)
        self.recorder.next_step()

    def report(self, steps: int) -> PrecisionReport:
        """What was found in these optimizer steps."""
        device = next((p.device.type for p in self._root.parameters()), "cpu")
        operations = self.recorder.operations
        records = tuple(_record(*item) for item in operations.items())
        verdicts = tuple(dict.fromkeys([*self._judged(), *self._seen(), *self._held()]))
        return PrecisionReport(self.precision, device, steps, records, verdicts)

    def _judged(self) -> Iterator[Verdict]:
        asleep = _asleep(self._root)
        for operation, magnitudes in self.recorder.operations.items():
            for rule, share in _broken(operation, magnitudes, self._scaled, asleep):
                yield _verdict(rule, operation, magnitudes, share)

    def _seen(self) -> Iterator[Verdict]:
        for note, operation in self.recorder.seen.items():
            found = self.recorder.operations.get(operation, Magnitudes())
            yield replace(_verdict(note.rule, operation, found), module=note.module, format=note.dtype)
        for name in self.recorder.changed_buffers:
            low, (module, _, own) = _name(self._root.get_buffer(name)), name.rpartition(".")
            yield Verdict(table.RUNNING, module, f"update of {own}", (low,), (low,), low)

    def _held(self) -> Iterator[Verdict]:
        names = {id(p): name for name, p in self._root.named_parameters()}
        for optimizer in self._optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                module, own = names.get(id(p), "").rpartition(".")[0], type(optimizer).__name__
                state = {key: x for key, x in optimizer.state[p].items() if isinstance(x, Tensor) and x.ndim}
                if not any("master" in key for key in state):
                    yield from _low(table.MASTER, module, own, p)
                for key, x in state.items():
                    yield from _low(table.STATE, module, f"{own} {key}", x)


def _low(rule: Rule, module: str, operator: str, x: Tensor) -> Iterator[Verdict]:
    if _name(x) in LOW:
        yield Verdict(rule, module, operator, (_name(x),), (_name(x),), _name(x))


def _asleep(root: nn.Module) -> bool:
    """Whether a layer that started at zero is still so close to it that what is behind it gets no gradient."""
    weights = [
        p.detach() for p in root.parameters() if p.requires_grad and p.ndim != 1 and p.is_floating_point()
    ]
    return any(float(w.float().square().mean().sqrt()) < _ASLEEP for w in weights)


def _broken(
    operation: Operation, magnitudes: Magnitudes, scaled: bool, asleep: bool
) -> Iterator[tuple[Rule, float]]:
    """Rules that an operation breaks, with the share of values lost."""
    if "::" in operation.operator and operation.operator.partition("::")[0] not in table.KNOWN:
        yield table.UNKNOWN, 0.0
    backward = operation.phase is Phase.BACKWARD
    if operation.phase is Phase.GRADIENTS and operation.operator in table.NORMS:
        if any(name in LOW for name in operation.outputs):
            yield table.GRADIENT_NORM, 0.0
    elif not backward:
        rule = table.rule_of(operation.operator)
        if rule is not None and table.breaks(rule, operation.outputs, magnitudes.reduced):
            yield rule, 0.0
    if not any(name in LOW for name in operation.outputs):
        return
    if not (backward and scaled):
        if magnitudes.overflows:
            yield table.OVERFLOW, 0.0
        elif magnitudes.relative >= NEAR:
            yield table.NEAR_LIMIT, 0.0
    if magnitudes.flushed_share >= (0.5 if backward else FLUSHED) and not (backward and asleep):
        yield table.UNDERFLOW, magnitudes.flushed_share


def _record(operation: Operation, m: Magnitudes) -> OperatorRecord:
    return OperatorRecord(
        *operation,
        m.calls,
        m.largest,
        m.root_mean_square,
        m.relative,
        m.flushed_share,
        m.subnormal,
        m.overflows,
    )


def _verdict(rule: Rule, operation: Operation, m: Magnitudes, share: float = 0.0) -> Verdict:
    types = (*operation.outputs[::-1], *operation.inputs)
    fault = next((name for name in types if name in LOW), operation.outputs[0])
    module, _, operator, inputs, outputs = operation
    return Verdict(rule, module, operator, inputs, outputs, fault, m.relative, share)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
