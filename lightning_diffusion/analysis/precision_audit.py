"""What ran in which number format, and what of it should have been float32.

A recorder (operator_recorder.py) has watched a few training steps; here its operations are held against the table
(operator_table.py), in the forward and between backward and optimizer. In backward, where autograd computes what the
forward asks for, only magnitudes are judged: under dynamic loss scaling overflow is part of the plan there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_diffusion.analysis import operator_table as table
from lightning_diffusion.analysis.findings import Finding, Severity
from lightning_diffusion.analysis.magnitudes import Magnitudes
from lightning_diffusion.analysis.operator_recorder import Operation, Phase, Recorder
from lightning_diffusion.analysis.operator_table import LOW, Rule

NEAR = 1 / 4
"""Share of a format's largest number from which values are close to it."""

FLUSHED = 0.1
"""Share of values that a cast may lose in the forward; in backward half of them."""

_ASLEEP = 1e-4
_SHOWN = 4


@dataclass(frozen=True)
class OperatorRecord:
    """One kind of operator in one module.

    Args:
        module: as in named_modules; empty outside of all modules.
        phase: forward, backward, gradients, optimizer or sampling.
        operator: of aten, or namespace::name.
        inputs, outputs: types.
        calls: how often it ran.
        largest: the largest finite magnitude of an output.
        root_mean_square: of outputs.
        relative: `largest` over the largest number of its format.
        flushed_share: of non-zero values that a cast or product made zero.
        subnormal: number of outputs below the smallest normal number.
        overflows: calls that made infinity of finite numbers.
    """

    module: str
    phase: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    calls: int
    largest: float
    root_mean_square: float
    relative: float
    flushed_share: float
    subnormal: int
    overflows: int


@dataclass(frozen=True)
class Verdict:
    """One rule that is broken in one place.

    Args:
        rule: of the table.
        module: where; the one to name in `fp32_modules`, empty outside of all modules.
        operator: that breaks it.
        inputs, outputs: its types.
        relative: its largest magnitude over the largest number of its format.
        share: of values or of weights that are lost; 0 where none are.
    """

    rule: Rule
    module: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    relative: float = 0.0
    share: float = 0.0

    @property
    def check(self) -> str:
        """The rule's name."""
        return self.rule.check

    @property
    def severity(self) -> Severity:
        """The rule's."""
        return self.rule.severity

    @property
    def format(self) -> str:
        """The type that is at fault."""
        return next((name for name in (*self.outputs[::-1], *self.inputs) if name in LOW), "float32")

    @property
    def where(self) -> str:
        """The module, in words."""
        return self.module or "outside of modules"


@dataclass(frozen=True)
class PrecisionReport:
    """What the audit of a training has found.

    Args:
        precision: of the Trainer.
        device: cpu, cuda, ...
        steps: optimizer steps that were watched.
        records: every operator that computed something, in the order of the step.
        verdicts: what breaks the table.
    """

    precision: str
    device: str
    steps: int
    records: tuple[OperatorRecord, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One for each rule that is broken and format, the worst first."""
        grouped: dict[tuple[Rule, str], list[Verdict]] = defaultdict(list)
        for verdict in self.verdicts:
            grouped[verdict.rule, verdict.format].append(verdict)
        found = [self._finding(*key, verdicts) for key, verdicts in grouped.items()]
        return tuple(sorted(found, key=lambda finding: finding.severity.rank))

    def _finding(self, rule: Rule, number_format: str, verdicts: Sequence[Verdict]) -> Finding:
        title = f"{rule.title} in {number_format}: {rule.why}."
        return Finding(rule.check, rule.severity, title, _evidence(verdicts), self._remedy(rule, verdicts))

    def _remedy(self, rule: Rule, verdicts: Sequence[Verdict]) -> str:
        if rule.check in _REMEDIES:
            return _REMEDIES[rule.check]
        names = self.patterns(verdict.module for verdict in verdicts)
        if not names:
            return "x = x.float()  # before it"
        precision = self.precision if self.precision in ("bf16-mixed", "16-mixed", "bf16-true") else "bf16-mixed"
        arguments = f"precision: {precision}, fp32_modules: [{', '.join(map(_quoted, names))}]"
        return f"trainer.plugins: [{{class_path: DiffusionPrecision, init_args: {{{arguments}}}}}]"

    def patterns(self, modules: Iterable[str]) -> list[str]:
        """Names for `fp32_modules`; "*.norm1" where all modules of that name are meant."""
        wanted = {module for module in modules if module}
        known = {record.module for record in self.records}
        by_name: dict[str, list[str]] = defaultdict(list)
        for module in sorted(wanted):
            by_name[module.rpartition(".")[2]].append(module)
        names: list[str] = []
        for name, found in by_name.items():
            everyone = {module for module in known if module.rpartition(".")[2] == name and "." in module}
            whole = len(found) > 1 and everyone == set(found) and not name.isdigit()
            names += [f"*.{name}"] if whole else found
        return names

    def to_dict(self) -> dict[str, Any]:
        """Everything, for machines."""
        verdicts = [{**asdict(v), "rule": v.check, "severity": v.severity.value} for v in self.verdicts]
        return {
            "precision": self.precision,
            "device": self.device,
            "steps": self.steps,
            "findings": [asdict(finding) for finding in self.findings],
            "verdicts": verdicts,
            "records": [asdict(record) for record in self.records],
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


_REMEDIES = {
    "loss": "loss = objective(output.float(), target.float())",
    "guidance": "u, c = u.float(), c.float()  # before guidance",
    "gradient-norm": "trainer.callbacks: [GradientClipping]  # its norms are float32",
    "master-weights": "trainer.plugins: [{class_path: DiffusionPrecision, init_args: {precision: bf16-mixed}}]",
    "optimizer-state": "trainer.plugins: [{class_path: DiffusionPrecision, init_args: {precision: bf16-mixed}}]",
    "unknown-kernel": "",
}


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
                yield _verdict(rule, operation, operation.module, magnitudes, share)

    def _seen(self) -> Iterator[Verdict]:
        for (rule, module), operation in self.recorder.seen.items():
            yield _verdict(rule, operation, module, self.recorder.operations.get(operation, Magnitudes()))
        for name in self.recorder.changed_buffers:
            low = _name(self._root.get_buffer(name))
            yield Verdict(table.RUNNING, name.rpartition(".")[0], f"update of {name.rpartition('.')[2]}", (low,), (low,))

    def _held(self) -> Iterator[Verdict]:
        names = {id(p): name for name, p in self._root.named_parameters()}
        for optimizer in self._optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                module = names.get(id(p), "").rpartition(".")[0]
                state = {key: x for key, x in optimizer.state[p].items() if isinstance(x, Tensor) and x.ndim}
                if _name(p) in LOW and not any("master" in key for key in state):
                    yield Verdict(table.MASTER, module, type(optimizer).__name__, (_name(p),), (_name(p),))
                for key, x in state.items():
                    if _name(x) in LOW:
                        yield Verdict(table.STATE, module, f"{type(optimizer).__name__} {key}", (_name(x),), (_name(x),))


def _asleep(root: nn.Module) -> bool:
    """Whether a layer that started at zero is still so close to it that what is behind it gets no gradient."""
    weights = [p.detach() for p in root.parameters() if p.requires_grad and p.ndim != 1 and p.is_floating_point()]
    return any(float(w.float().square().mean().sqrt()) < _ASLEEP for w in weights)


def _broken(operation: Operation, magnitudes: Magnitudes, scaled: bool, asleep: bool) -> Iterator[tuple[Rule, float]]:
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
        *operation, m.calls, m.largest, m.root_mean_square, m.relative, m.flushed_share, m.subnormal, m.overflows
    )


def _verdict(rule: Rule, operation: Operation, module: str, m: Magnitudes, share: float = 0.0) -> Verdict:
    return Verdict(rule, module, operation.operator, operation.inputs, operation.outputs, m.relative, share)


def _evidence(verdicts: Sequence[Verdict]) -> str:
    by_module = {verdict.where: verdict for verdict in verdicts}
    shown = [f"{module} ({_detail(verdict)})" for module, verdict in list(by_module.items())[:_SHOWN]]
    more = len(by_module) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _detail(verdict: Verdict) -> str:
    if verdict.share:
        return f"{verdict.operator}, {verdict.share:.0%} of non-zero values"
    if verdict.rule in (table.OVERFLOW, table.NEAR_LIMIT):
        return f"{verdict.operator}, up to {verdict.relative:.2f} of the largest number"
    return verdict.operator


def _quoted(pattern: str) -> str:
    return f'"{pattern}"' if "*" in pattern else pattern


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")

