"""How long the training takes on this machine, where the time goes, and what would be faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lightning_diffusion.analysis.findings import Examination, Finding, Section, Severity, Table
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.step_times import (
    Kind,
    StepTimes,
    kind_of,
    kinds,
    loading_time,
    network_time,
    step_time,
    workers,
)

_FASTER = 1.2
_WAITING, _OUTSIDE = 0.5, 0.3  # waiting for data over the step; share of the step outside the network
_DATA = "data.init_args.num_workers: {}"
_LOW = "trainer.plugins: [{class_path: DiffusionPrecision, init_args: {precision: bf16-mixed}}]"


class TimeExamination(Examination):
    """A few steps of each kind, on this machine's device; what a GPU elsewhere does is not known here."""

    name = "time"

    def __call__(self, patient: Patient) -> Section:
        if getattr(patient.module, "objective", None) is None:
            return Section(self.name)
        measured = {kind: step_time(patient, kind) for kind in kinds(patient.trainer.device.type)}
        own = kind_of(patient)
        ran = Kind("fp32") if measured[own] is None else own
        seconds = measured[ran]
        if seconds is None:
            return Section(self.name, (_slow(patient),), (_compared(measured, own),))
        network = network_time(patient, ran)
        times = StepTimes(seconds, network and min(network, seconds), loading_time(patient), workers(patient))
        found = [
            *_hours(patient, times),
            *_loading(times),
            *_outside(times),
            *_faster(measured, ran, own, seconds),
        ]
        return Section(self.name, tuple(found), (_parts(patient, times), _compared(measured, own)))


def _slow(patient: Patient) -> Finding:
    title = "Steps take longer than the doctor waits for, or fail: nothing was timed."
    return Finding("slow", Severity.NOTE, title, f"on this machine's {patient.trainer.device.type}")


def _hours(patient: Patient, times: StepTimes) -> Iterator[Finding]:
    total = patient.total_steps
    if total is None:
        return
    evidence = (
        f"{total} steps of {_ms(_whole(patient, times))} on this machine's {patient.trainer.device.type}, without "
        "validation and pictures"
    )
    title = f"The training takes {_duration(total * _whole(patient, times))}."
    yield Finding("hours", Severity.NOTE, title, evidence)


def _whole(patient: Patient, times: StepTimes) -> float:
    return times.whole * patient.trainer.accumulate


def _loading(times: StepTimes) -> Iterator[Finding]:
    waiting = times.whole - times.step
    if waiting > _WAITING * times.step:
        title = "The network waits for data."
        evidence = f"a batch takes {_ms(times.loading)} to load, a step {_ms(times.step)}"
        severity = Severity.WARNING if waiting > times.step else Severity.NOTE
        yield Finding("loading", severity, title, evidence, _DATA.format(2 * times.workers or 4))


def _outside(times: StepTimes) -> Iterator[Finding]:
    if times.network is None:
        return
    share = 1 - times.network / times.whole
    if share > _OUTSIDE:
        title = "Much of a step is not the network: loss, optimizer, loading."
        evidence = f"{share:.0%} of {_ms(times.whole)}"
        yield Finding("outside", Severity.NOTE, title, evidence, "data.init_args.batch_size: larger")


def _faster(measured: Mapping[Kind, float | None], ran: Kind, own: Kind, seconds: float) -> Iterator[Finding]:
    known = {kind: time for kind, time in measured.items() if time is not None}
    best = min(known, key=lambda kind: known[kind])
    if seconds > _FASTER * known[best]:
        configured = " as configured" if ran == own else ""
        evidence = f"{best.name} takes {_ms(known[best])}, {ran.name}{configured} {_ms(seconds)}"
        remedy = _LOW if best.precision == "bf16-mixed" != own.precision else ""
        if own.precision == "bf16-mixed" != best.precision:
            remedy = "trainer.precision: 32-true"
        title = f"{best.name} is {seconds / known[best]:.1f} times as fast here."
        where = "; in Python network.to(memory_format=torch.channels_last)" if best.channels_last else ""
        yield Finding("faster", Severity.NOTE, title, evidence + where, remedy)


def _parts(patient: Patient, times: StepTimes) -> Table:
    whole, per_second = times.whole, patient.batch_size / times.whole
    rows = (
        (
            "loading, meanwhile" if times.workers else "loading",
            _ms(times.loading),
            f"{times.loading / whole:.0%}",
        ),
        *((what, _ms(seconds), f"{seconds / whole:.0%}") for what, seconds in _within(times)),
        ("together", _ms(whole), f"{per_second:.0f} images/s"),
    )
    return Table(
        f"A micro-batch of {patient.batch_size} on {patient.trainer.device.type}", ("", "time", "share"), rows
    )


def _within(times: StepTimes) -> tuple[tuple[str, float], ...]:
    if times.network is None:
        return (("network, loss, optimizer", times.step),)
    return ("network, forward and backward", times.network), ("loss, optimizer", times.step - times.network)


def _compared(measured: Mapping[Kind, float | None], own: Kind) -> Table:
    rows = tuple(
        (
            f"{kind.name}{' (as configured)' if kind == own else ''}",
            "did not run, or too slow" if time is None else _ms(time),
        )
        for kind, time in measured.items()
    )
    return Table("Kinds of steps", ("", "loss, gradient, optimizer"), rows)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{max(seconds / 60, 0.1):.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
