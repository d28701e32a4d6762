"""What the first steps compute in which number format, and which precision this machine should use."""

from __future__ import annotations

import copy

import torch

from lightning_diffusion.analysis.findings import Examination, Finding, Picture, Section, Severity, Table
from lightning_diffusion.analysis.magnitude_chart import magnitude_chart
from lightning_diffusion.analysis.number_formats import (
    Hardware,
    Recommendation,
    hardware_of,
    number_format,
    recommended_precision,
)
from lightning_diffusion.analysis.operator_table import LOW
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.precision_examination import audited
from lightning_diffusion.analysis.precision_report import PrecisionReport
from lightning_diffusion.callbacks.gradient_callback import GradientCallback
from lightning_diffusion.precision import DiffusionPrecision

STEPS = 3
_ROWS = 10


class PrecisionExamination(Examination):
    """Audits three training steps, clipping among them, and a guided sample."""

    name = "precision"

    def __call__(self, patient: Patient) -> Section:
        clipping = [copy.deepcopy(c) for c in patient.trainer.callbacks if isinstance(c, GradientCallback)]
        steps = min(STEPS, patient.steps)
        report = audited(patient.prepared(), patient.data, patient.trainer, steps, clipping)
        hardware = hardware_of(patient.trainer.device.type)
        advice = recommended_precision(hardware)
        closest = _closest(report)
        tables = (_formats(report, hardware, advice), *([closest] if closest.rows else []))
        chart = Picture("Magnitudes by layer", lambda dark: magnitude_chart(report))
        found = (*_unscaled(patient), *report.findings, *_advised(report, hardware, advice))
        return Section(self.name, found, tables, (chart,))


def _unscaled(patient: Patient) -> tuple[Finding, ...]:
    """Float16 whose losses nobody scales: of a plugin without a scaler, or of parameters in float16."""
    precision, plugin = patient.trainer.precision, patient.trainer.precision_plugin
    scaled = precision == "16-mixed" and (plugin is None or getattr(plugin, "scaler", None) is not None)
    if precision not in ("16-mixed", "16-true") or scaled or isinstance(plugin, DiffusionPrecision):
        return ()
    smallest = number_format(torch.float16).smallest_subnormal
    evidence = (
        f"found {precision}: gradients below {smallest / 2:.1e} become 0, as most do late in a training"
    )
    remedy = "trainer.plugins: [{class_path: DiffusionPrecision, init_args: {precision: 16-mixed}}]"
    title = "Float16 without loss scaling: small gradients vanish."
    return (Finding("loss-scaling", Severity.ERROR, title, evidence, remedy),)


def _advised(report: PrecisionReport, hardware: Hardware, advice: Recommendation) -> tuple[Finding, ...]:
    if report.precision == advice.precision:
        return ()
    plugin = (
        f"trainer.plugins: [{{class_path: DiffusionPrecision, init_args: {{precision: {advice.precision}}}}}]"
    )
    remedy = "trainer.precision: 32-true" if advice.precision == "32-true" else plugin
    title = f"This machine's {hardware.kind} should train in {advice.precision}."
    evidence = f"found {report.precision}; {advice.reason}"
    return (Finding("hardware", Severity.NOTE, title, evidence, remedy),)


def _formats(report: PrecisionReport, hardware: Hardware, advice: Recommendation) -> Table:
    rows = (
        ("audited", f"{report.precision} on {report.device}, {report.steps} steps"),
        ("bfloat16 in hardware", "yes" if hardware.bfloat16 else "no"),
        ("float16 in hardware", "yes" if hardware.float16 else "no"),
        ("recommended", f"{advice.precision}: {advice.reason}"),
    )
    return Table("Precision", ("", ""), rows)


def _closest(report: PrecisionReport) -> Table:
    """Operators in 16 bits by how close they come to the end of their format."""
    low = [r for r in report.records if r.largest and any(name in LOW for name in r.outputs)]
    worst = sorted(low, key=lambda r: -r.relative)[:_ROWS]
    rows = tuple(
        (
            r.module,
            r.phase,
            r.operator,
            " ".join(dict.fromkeys(r.outputs)),
            f"{r.largest:.3g}",
            f"{r.relative:.1e}",
        )
        for r in worst
    )
    header = ("module", "phase", "operator", "type", "largest", "over the format's largest")
    return Table("Closest to the largest number of their format", header, rows)
