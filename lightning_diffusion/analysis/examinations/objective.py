"""What the objective trains on: levels, weights, singular targets, and how they fit the sampler and the data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lightning_diffusion.analysis.findings import Examination, Finding, Picture, Section, Severity, Table
from lightning_diffusion.analysis.objective_charts import weight_chart
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.trained_levels import DataMoments, Start, TrainedLevels, amplification
from lightning_diffusion.noise_level import NoiseLevel

_IDLE, _MOSTLY_IDLE = 0.4, 0.8  # shares of draws
_SPAN = 1e6
_FEW = 0.05
_MISMATCH, _FAR_MISMATCH = 0.2, 20.0  # nats
_AMPLIFIED, _SINGULAR = 1e5, 1e8
_BEYOND, _FAR_BEYOND = 0.5, 6.0  # log-SNR
_SIGNAL_LEFT, _NOISE_LEFT = 0.05, 0.1  # of the other's deviation, at the edge of what is trained


class ObjectiveExamination(Examination):
    """By drawing levels, weighting them and asking the sampler for its own; data count by their variances."""

    name = "objective"

    def __call__(self, patient: Patient) -> Section:
        if getattr(patient.module, "objective", None) is None:
            return Section(self.name)
        objective, sampler = patient.objective, patient.sampler
        if (deviation := float(patient.drawn.x0.std())) < 1e-6:
            raise ValueError(f"Found training data of deviation {deviation:.2g}; expected data that differ.")
        levels = TrainedLevels.of(objective, DataMoments.of(patient.drawn.x0))
        sampled: NoiseLevel = objective.schedule.sampling_levels(sampler.num_steps)
        start = Start.of(sampled, levels.data)
        found = [*_weights(levels), *_draws(levels), *_sampler(levels, sampled), *_start(start, objective)]
        found += [*_singular(levels, sampled), *_guidance(patient)]
        chart = Picture(
            "What is trained on, beside shipped recipes", lambda dark: weight_chart(levels, sampled)
        )
        return Section(self.name, tuple(found), (_table(levels, start, sampled),), (chart,))


def _weights(levels: TrainedLevels) -> Iterator[Finding]:
    weight = levels.weight
    if not bool(weight.isfinite().all()) or bool((weight < 0).any()) or not bool((weight > 0).any()):
        wrong = int((~weight.isfinite() | (weight < 0)).sum())
        evidence = f"{wrong} of {len(weight)} drawn levels, {int((weight == 0).sum())} of weight 0"
        yield Finding(
            "weight",
            Severity.ERROR,
            "The weight is not a finite number of at least 0 everywhere.",
            evidence,
            _EDM,
        )
        return
    counts = f"90 % of the weight is on {levels.concentration:.1%} of the draws"
    if levels.span > _SPAN:
        title = "The effective weight spans too much: a few levels drown all others."
        evidence = f"a factor of {levels.span:.2g} between drawn levels; {counts}"
        severity = Severity.ERROR if levels.concentration < 2 * _FEW else Severity.WARNING
        yield Finding("weight-span", severity, title, evidence, _EDM)
    elif levels.concentration < _FEW:
        title = "Nearly all of the weight is on few of the draws: gradients are of these alone, and noisy."
        yield Finding(
            "weight-concentrated",
            Severity.WARNING,
            title,
            f"{counts}; a span of {levels.span:.2g}",
            "model.objective.init_args.density: AdaptiveDensity",
        )


_EDM = "model.objective.init_args.weighting: EDMWeighting  # 1 on the unit-variance residual"


def _draws(levels: TrainedLevels) -> Iterator[Finding]:
    idle = levels.idle_noise + levels.idle_clean
    if max(idle, levels.unweighted) <= _IDLE:
        return
    middle = float(levels.log_snr[len(levels.log_snr) // 2])
    evidence = (
        f"{levels.idle_noise:.0%} of the draws are so noisy that x_t tells nothing of the image, "
        f"{levels.idle_clean:.0%} have no noise to speak of, {levels.unweighted:.0%} have weight 0; "
        f"the median log-SNR is {middle:.3g}, that of equal signal and noise {-math.log(levels.data.variance):.3g}"
    )
    severity = Severity.ERROR if max(idle, levels.unweighted) > _MOSTLY_IDLE else Severity.WARNING
    title = "Most draws are spent where nothing can be learned."
    mean = -1.2 + math.log(levels.data.variance**0.5 / 0.5)
    remedy = (
        "model.objective.init_args.density: {class_path: LogNormalSigma, init_args: "
        f"{{mean: {mean:.2f}, std: 1.2}}}}"
    )
    yield Finding("idle-draws", severity, title, evidence, remedy)


def _sampler(levels: TrainedLevels, sampled: NoiseLevel) -> Iterator[Finding]:
    asked = NoiseLevel(sampled.alpha[:-1], sampled.sigma[:-1]).log_snr.clamp(-20, 20)
    low, high = levels.ends
    variance = levels.data.variance
    noisier, cleaner = low - float(asked.min()), float(asked.max()) - high
    signal, noise = math.exp(low / 2) * variance**0.5, math.exp(-high / 2) / variance**0.5
    bad_noisy = noisier > _FAR_BEYOND or (noisier > _BEYOND and signal > _SIGNAL_LEFT)
    bad_clean = cleaner > _FAR_BEYOND or (cleaner > _BEYOND and noise > _NOISE_LEFT)
    if not (bad_noisy or bad_clean):
        return
    evidence = (
        f"training draws log-SNR {low:.3g} .. {high:.3g} (sigma/alpha {math.exp(-high / 2):.3g} .. "
        f"{math.exp(-low / 2):.3g}), sampling asks for {float(asked.min()):.3g} .. {float(asked.max()):.3g}; at these "
        f"edges the signal is {signal:.2g} of the noise, the noise {noise:.2g} of the signal"
    )
    severity = (
        Severity.ERROR
        if max(noisier, cleaner) > _FAR_BEYOND or (signal if bad_noisy else 0) > 0.2
        else Severity.WARNING
    )
    remedy = _within(levels, low, high)
    title = "The sampler passes through levels that training does not draw."
    yield Finding("sampler-range", severity, title, evidence, remedy)


def _within(levels: TrainedLevels, low: float, high: float) -> str:
    """The sampler's range cut to training's, where a schedule has one of its own; else a density that covers it."""
    schedule: Any = levels.objective.schedule
    if not hasattr(schedule, "sigma_max"):
        return "model.objective.init_args.density: UniformTime  # draws every level of the schedule"
    least, most = max(schedule.sigma_min, math.exp(-high / 2)), min(schedule.sigma_max, math.exp(-low / 2))
    bounds = f"{{sigma_min: {least:.2g}, sigma_max: {most:.3g}}}"
    return (
        f"model.objective.init_args.schedule: {{class_path: {type(schedule).__name__}, init_args: {bounds}}}"
    )


def _start(start: Start, objective: Any) -> Iterator[Finding]:
    if start.nats <= _MISMATCH:
        return
    evidence = (
        f"at the first level SNR is {float(start.level.snr):.3g}; the strongest component of the data, brightness as a "
        f"rule, still has {start.signal:.2g} of the noise's deviation: {start.nats:.2g} nats from pure noise"
    )
    title = (
        "Sampling starts from pure noise, training ends in noisy images: brightness and contrast will be off."
    )
    severity = Severity.ERROR if start.nats > _FAR_MISMATCH else Severity.WARNING
    yield Finding("terminal-snr", severity, title, evidence, _more_noise(objective))


def _more_noise(objective: Any) -> str:
    schedule = objective.schedule
    name = type(schedule).__name__
    if hasattr(schedule, "sigma_max"):
        larger = f"init_args: {{sigma_max: {4 * schedule.sigma_max:g}}}"
        return f"model.objective.init_args.schedule: {{class_path: {name}, {larger}}}"
    zero = f"schedule: {{class_path: {name}, init_args: {{zero_terminal_snr: true}}}}"
    return f"model.objective: {{class_path: VPrediction, init_args: {{{zero}}}}}"


def _singular(levels: TrainedLevels, sampled: NoiseLevel) -> Iterator[Finding]:
    noisy = NoiseLevel(sampled.alpha[:-1], sampled.sigma[:-1])
    factor = float(amplification(levels.objective, noisy).max())
    if factor <= _AMPLIFIED:
        return
    target = type(levels.objective.preconditioning.target).__name__
    evidence = f"an error of the network's output is {factor:.2g} times as large in x_0 at the noisiest level"
    severity = Severity.ERROR if factor > _SINGULAR else Severity.WARNING
    title = f"x_0 hardly follows from {target} at the levels where sampling starts."
    yield Finding("singular", severity, title, evidence, "model.objective.init_args.target: V")


def _guidance(patient: Patient) -> Iterator[Finding]:
    module: Any = patient.module
    labelled = getattr(module, "num_classes", 0) and patient.drawn.labels is not None
    if not labelled or getattr(module, "label_dropout", 1) > 0:
        return
    guided = [type(c).__name__ for c in patient.trainer.callbacks if _guides(c)]
    title = "The null label is never trained (label_dropout is 0): guidance and samples without a label are noise."
    evidence = f"{', '.join(guided)} would draw with guidance" if guided else "label_dropout 0"
    severity = Severity.ERROR if guided else Severity.WARNING
    yield Finding("label-dropout", severity, title, evidence, "model.label_dropout: 0.1")


def _guides(callback: Any) -> bool:
    return any(getattr(one, "guidance", None) is not None for one in getattr(callback, "draws", ()))


def _table(levels: TrainedLevels, start: Start, sampled: NoiseLevel) -> Table:
    asked = NoiseLevel(sampled.alpha[:-1], sampled.sigma[:-1]).log_snr
    low, high = levels.ends
    rows = (
        ("log-SNR drawn (all but 1e-4 at either end)", f"{low:.3g} .. {high:.3g}"),
        ("log-SNR of the sampler's steps", f"{float(asked.min()):.3g} .. {float(asked.max()):.3g}"),
        (
            "draws where nothing can be learned",
            f"{levels.idle_noise:.1%} too noisy, {levels.idle_clean:.1%} clean",
        ),
        ("weight on the residual, largest over smallest", f"{levels.span:.2g}"),
        ("share of draws with 90 % of the weight", f"{levels.concentration:.0%}"),
        ("start of sampling, nats from training's end", f"{start.nats:.2g}"),
        (
            "largest x_0 error per error of the output",
            f"{float(amplification(levels.objective, NoiseLevel(sampled.alpha[:-1], sampled.sigma[:-1])).max()):.2g}",
        ),
    )
    return Table("Noise levels", ("", ""), rows)
