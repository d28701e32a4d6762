"""What the audit of a training found, for people and machines."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_diffusion.analysis import operator_table as table
from lightning_diffusion.analysis.findings import Finding, Severity
from lightning_diffusion.analysis.operator_table import Rule

_SHOWN = 4
_LOW_PRECISIONS = ("bf16-mixed", "16-mixed", "bf16-true")


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
        format: the one at fault.
        relative: its largest magnitude over the largest number of its format.
        share: of values or of weights that are lost; 0 where none are.
    """

    rule: Rule
    module: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    format: str
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
        remedy = self._remedy(rule, verdicts)
        advice = "" if remedy else f"; {_IN_PYTHON.get(rule.check, 'compute it of x.float()')}"
        return Finding(rule.check, rule.severity, title, _evidence(verdicts) + advice, remedy)

    def _remedy(self, rule: Rule, verdicts: Sequence[Verdict]) -> str:
        """A line of YAML; empty where no module can be named."""
        if rule in _REMEDIES:
            return _REMEDIES[rule]
        names = [] if rule.check in _IN_PYTHON else self.patterns(verdict.module for verdict in verdicts)
        if not names:
            return ""
        precision = self.precision if self.precision in _LOW_PRECISIONS else "bf16-mixed"
        return _plugin(f"precision: {precision}, fp32_modules: [{', '.join(map(_quoted, names))}]")

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


def _plugin(arguments: str) -> str:
    return f"trainer.plugins: [{{class_path: DiffusionPrecision, init_args: {{{arguments}}}}}]"


_REMEDIES = {
    table.GRADIENT_NORM: "trainer.callbacks: [GradientClipping]",
    table.MASTER: _plugin("precision: bf16-mixed"),
    table.STATE: _plugin("precision: bf16-mixed"),
}
_IN_PYTHON = {
    "loss": "compute the loss of output.float()",
    "guidance": "guide with u.float() and c.float()",
    "unknown-kernel": "look into it, or call it with x.float()",
}


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
