"""What the run needs of a device's memory as it is configured, what other settings would, and whether it fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_diffusion.analysis.findings import Examination, Finding, Section, Severity, Table
from lightning_diffusion.analysis.memory import MemoryPlan, MemoryPlanner, Setting, Strategy
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.trainer_settings import TrainerSettings

_HEADER = ("parameters", "gradients", "optimizer", "averages", "activations", "communication", "total")
_NEARLY = 0.9  # share of the memory above which libraries and fragmentation may not fit any more
_OTHERS = (("bf16-mixed", False), ("bf16-true", False), ("32-true", True), ("bf16-mixed", True))


class MemoryExamination(Examination):
    """Plans from shapes alone, so a run on eight GPUs can be planned where there is none.

    It is held against `doctor --memory`, or against this machine's GPU where there is one.
    """

    name = "memory"

    def __call__(self, patient: Patient) -> Section:
        memory = patient.memory or _memory_here()
        planners = _planners(patient)
        plans = {name: planner.plan() for name, planner in planners.items()}
        largest = (
            {name: planner.estimated_batch(memory) for name, planner in planners.items()} if memory else {}
        )
        own = plans["as configured"]
        spread = _spread(own, planners["as configured"])
        title = f"per device, batch {own.batch_size} per device and micro-batch"
        tables = [
            Table(title, ("", *_header(memory)), tuple(_row(n, p, largest.get(n)) for n, p in plans.items()))
        ]
        tables.append(Table(f"over devices, each batch {own.batch_size}", ("", *_HEADER), spread))
        return Section(self.name, tuple(_findings(patient, own, largest, memory)), tuple(tables))


def setting_of(trainer: TrainerSettings) -> Setting:
    """How a Trainer would train."""
    return Setting(_plugin_of(trainer), strategy=_strategy_of(trainer), devices=trainer.devices)


def _planners(patient: Patient) -> dict[str, MemoryPlanner]:
    batch, own = patient.batches(1)[0], setting_of(patient.trainer)
    settings: dict[str, Setting] = {"as configured": own}
    for precision, checkpointing in _OTHERS:
        if (precision, checkpointing) != (patient.trainer.precision, False):
            settings[_named(precision, checkpointing)] = replace(
                own, precision=precision, checkpointing=checkpointing
            )
    extras = (patient.trainer.callbacks, patient.trainer.accumulate)
    return {
        name: MemoryPlanner(patient.module, batch, setting, *extras) for name, setting in settings.items()
    }


def _plugin_of(trainer: TrainerSettings) -> str | Precision:
    """Lightning's own plugins where the Trainer has `precision`."""
    if trainer.precision_plugin is not None:
        return trainer.precision_plugin
    precision: Any = trainer.precision
    if precision.endswith("-mixed"):
        return MixedPrecision(
            precision, "cpu", torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
        )
    plugins: dict[str, Any] = {
        "bf16-true": HalfPrecision,
        "16-true": HalfPrecision,
        "64-true": DoublePrecision,
    }
    made: Precision = plugins[precision](precision) if precision in plugins else Precision()
    return made if precision != "64-true" else DoublePrecision()


def _strategy_of(trainer: TrainerSettings) -> Strategy:
    given = trainer.strategy
    if isinstance(given, (FSDPStrategy, ModelParallelStrategy)) or "fsdp" in str(given):
        return "fsdp"
    several = trainer.devices > 1 or isinstance(given, DDPStrategy) or "ddp" in str(given)
    return "ddp" if several else "one"


def _memory_here() -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _spread(own: MemoryPlan, planner: MemoryPlanner) -> tuple[tuple[str, ...], ...]:
    choices: list[tuple[Strategy, int]] = [("one", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 8)]
    settings = [replace(own.setting, strategy=strategy, devices=devices) for strategy, devices in choices]
    names = ["one device", *(f"{s.strategy.upper()}, {s.devices} devices" for s in settings[1:])]
    return tuple(
        _row(name, planner.over(setting), None) for name, setting in zip(names, settings, strict=True)
    )


def _findings(
    patient: Patient, own: MemoryPlan, largest: dict[str, int], memory: int | None
) -> list[Finding]:
    if memory is None:
        said = f"{in_gb(own.total)} per device; give --memory SIZE to hold it against a device"
        return [Finding("memory", Severity.NOTE, "The memory that the run needs.", said)]
    share = own.total / memory
    evidence = (
        f"the plan is {in_gb(own.total)} of {in_gb(memory)} with a batch of {own.batch_size}; "
        f"about {_largest(largest)} would fit, before what libraries take"
    )
    remedy = _remedy(patient, own.batch_size, largest)
    if share > 1:
        return [
            Finding(
                "memory", Severity.ERROR, "The run does not fit into the device's memory.", evidence, remedy
            )
        ]
    if share > _NEARLY:
        title = "The run may not fit: a tenth is usual for libraries and fragmentation."
        return [Finding("memory", Severity.WARNING, title, evidence, remedy)]
    return [Finding("memory", Severity.NOTE, f"The run takes {share:.0%} of the device's memory.", evidence)]


def _largest(largest: dict[str, int]) -> str:
    return ", ".join(f"{number} ({name})" for name, number in largest.items())


def _remedy(patient: Patient, batch_size: int, largest: dict[str, int]) -> str:
    """The same images per step in more micro-batches, or low precision where a single image is too many."""
    fits = largest["as configured"] and max(1, int(largest["as configured"] * _NEARLY))
    if not fits:
        better = max(largest, key=lambda name: largest[name])
        return (
            f"no batch fits; {better} is the smallest"
            if largest[better]
            else "no batch fits: a smaller network"
        )
    times = next(k for k in range(1, batch_size + 1) if batch_size % k == 0 and batch_size // k <= fits)
    accumulate = patient.trainer.accumulate * times
    return (
        f"data.init_args.batch_size: {batch_size // times} with trainer.accumulate_grad_batches: {accumulate}; or "
        "trainer.plugins: [{class_path: DiffusionPrecision, init_args: {precision: bf16-mixed}}]"
    )


def _named(precision: str, checkpointing: bool) -> str:
    return f"{precision}{', checkpointed' if checkpointing else ''}"


def _header(memory: int | None) -> tuple[str, ...]:
    return (*_HEADER, f"largest batch in {in_gb(memory)}, about") if memory else _HEADER


def _row(name: str, plan: MemoryPlan, largest: int | None) -> tuple[str, ...]:
    numbers = (name, *(in_gb(part) for part in plan.parts), in_gb(plan.total))
    return numbers if largest is None else (*numbers, str(largest))


def in_gb(size: int) -> str:
    """Bytes as MB or GB, in powers of ten."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
