"""What the network is given and asked for at each noise level: measured, on the data, with the network itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_diffusion.analysis.conditioning_charts import conditioning_chart
from lightning_diffusion.analysis.findings import Examination, Finding, Picture, Section, Severity, Table
from lightning_diffusion.analysis.level_profile import LevelProfile, attention_growth, level_profile
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.targets import Space

_UNEVEN, _BADLY = 2.5, 10.0  # factors between deviations and 1
_GRADIENTS = 100
_LOUD = 1.5  # output over residual, deviations
_SHARP, _GROWTH = 50.0, 3.0
_EVERY = 2  # of the levels, in the table


class ConditioningExamination(Examination):
    """Variance in and out, gradient norms by level, whether the output starts at zero, growth of attention logits."""

    name = "conditioning"

    def __call__(self, patient: Patient) -> Section:
        if getattr(patient.module, "objective", None) is None:
            return Section(self.name)
        device = patient.trainer.device
        try:
            profile, grown = _measured(patient, device)
        except torch.OutOfMemoryError:  # the run's own precision may need less
            profile, grown = _measured(patient, torch.device("cpu"))
        found = [*_deviations(profile, patient), *_gradients(profile), *_output(profile)]
        if grown is not None:
            found += _attention(*grown)
        chart = Picture("Conditioning by noise level", lambda dark: conditioning_chart(profile))
        return Section(self.name, tuple(found), (_table(profile, grown), _levels(profile)), (chart,))


def _measured(patient: Patient, device: torch.device) -> tuple[LevelProfile, tuple[float, float, int] | None]:
    """In float32, the network and what it is given on this device."""
    module = patient.prepared().to(device)
    profile = level_profile(module, patient.drawn, patient.seed, patient.batch_size)
    return profile, attention_growth(patient, device)


def _deviations(profile: LevelProfile, patient: Patient) -> Iterator[Finding]:
    objective = patient.objective
    given = f"{{sigma_data: {objective.sigma_data:g}}}"
    standardized = f"model.representation: {{class_path: Standardize, init_args: {given}}}"
    unit_variance = objective.preconditioning.output_space is Space.RESIDUAL
    remedy = standardized if unit_variance else "model.objective: EDM  # unit variance in and out"
    for check, what, values in (
        ("input", "input", profile.inputs),
        ("residual", "regression target", profile.residuals),
    ):
        far = max(float(values.max()), 1 / max(float(values.min()), 1e-9))
        if far > _UNEVEN:
            title = f"The network's {what} has not unit variance at every level."
            evidence = (
                f"deviation {float(values.min()):.3g} .. {float(values.max()):.3g} over the drawn levels"
            )
            severity = Severity.ERROR if far > _BADLY else Severity.WARNING
            yield Finding(check, severity, title, evidence, remedy)


def _gradients(profile: LevelProfile) -> Iterator[Finding]:
    norms = profile.gradients
    if not bool(norms.isfinite().all()):
        title = "Gradients of some level are not finite."
        levels = ", ".join(f"{one:.3g}" for one in profile.measured[~norms.isfinite()].tolist())
        yield Finding("gradient-levels", Severity.ERROR, title, f"at log-SNR {levels}")
    elif float(norms.max()) > _GRADIENTS * profile.typical_gradient:
        title = "A level's gradient is so much larger than others' that it decides every step."
        evidence = (
            f"norms of up to {float(norms.max()):.2g}, half of the draws have less than "
            f"{profile.typical_gradient:.2g}, each weighted as in training"
        )
        remedy = "model.objective.init_args.weighting: EDMWeighting"
        yield Finding("gradient-levels", Severity.WARNING, title, evidence, remedy)


def _output(profile: LevelProfile) -> Iterator[Finding]:
    loudest = float((profile.outputs / profile.residuals).max())
    if loudest > _LOUD:
        title = "The network starts far from zero: the first steps only unlearn what it begins with."
        evidence = f"its output has up to {loudest:.3g} times the deviation of what it has to predict"
        yield Finding("output-start", Severity.WARNING, title, evidence)


def _attention(before: float, after: float, steps: int) -> Iterator[Finding]:
    if after > _SHARP or (after > 10 and after > _GROWTH * max(before, 1e-9)):
        title = "Attention logits grow fast: the softmax will saturate and the loss spike."
        evidence = f"largest logit {before:.3g} at the start, {after:.3g} after {steps} steps"
        remedy = "model.learning_rate: {class_path: WarmupCosine, init_args: {warmup_steps: 1000}}"
        yield Finding("attention-logits", Severity.WARNING, title, evidence, remedy)


def _table(profile: LevelProfile, grown: Any) -> Table:
    zero = float(profile.outputs.max()) < 1e-6
    start = "zero" if zero else f"deviation up to {float(profile.outputs.max()):.3g}"
    rows = [
        ("input, deviation by level", _range(profile.inputs)),
        ("regression target, deviation by level", _range(profile.residuals)),
        ("gradient norm by level", _range(profile.gradients) + _skipped(profile)),
        ("output at the start", start),
    ]
    if grown is not None:
        rows.append(
            ("largest attention logit", f"{grown[0]:.3g} at the start, {grown[1]:.3g} after {grown[2]} steps")
        )
    return Table("Over the drawn levels", ("", ""), tuple(rows))


def _levels(profile: LevelProfile) -> Table:
    """Every second level, from noise to clean images."""
    norms = dict(zip(profile.measured.tolist(), profile.gradients.tolist(), strict=True))
    columns = (profile.log_snr.tolist(), profile.inputs, profile.residuals)
    rows = tuple(
        (
            f"{level:.1f}",
            *(f"{float(x):.3g}" for x in others),
            f"{norms[level]:.3g}" if level in norms else "",
        )
        for level, *others in list(zip(*columns, strict=True))[::_EVERY]
    )
    header = ("log-SNR", "input", "target", "parameters' gradient norm")
    return Table("Deviations, and gradient norms as training weighs levels", header, rows)


def _skipped(profile: LevelProfile) -> str:
    known, every = len(profile.measured), len(profile.log_snr)
    return f" ({known} of {every} levels; the others took too long)" if known < every else ""


def _range(values: Any) -> str:
    return f"{float(values.min()):.3g} .. {float(values.max()):.3g}"
