"""Examine what is about to be trained, by drawing from its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_diffusion.analysis.examinations import chosen
from lightning_diffusion.analysis.findings import Examination, Section
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.refusals import refused
from lightning_diffusion.analysis.report import Report


def examine(
    patient: Patient,
    only: Sequence[str] | None = None,
    after_each: Callable[[str], None] = lambda name: None,
) -> Report:
    """Run examinations one after the other, each under the random numbers of the run.

    Args:
        patient: left as it is, as are the process's random generators.
        only: names of examinations; all if None.
        after_each: is told the name of each examination that is done.

    Returns:
        the report, sections in the order of the registry.

    Raises:
        ValueError: for a name that there is not, or data that yield no batch.
    """
    examinations = chosen(only)
    with patient.undisturbed():
        patient.batches(1)
    sections = []
    for examination in examinations:
        with patient.undisturbed():
            sections.append(_section(examination, patient))
        after_each(examination.name)
    return Report(_subject(patient), tuple(sections))


def _section(examination: Examination, patient: Patient) -> Section:
    """What it found; an error meant for the user would end the run as well, and is a finding."""
    try:
        return examination(patient)
    except Exception as error:
        finding = refused(error)
        if finding is None:
            raise
        return Section(examination.name, (finding,))


def _subject(patient: Patient) -> str:
    network = getattr(patient.module, "network", patient.module)
    objective = getattr(patient.module, "objective", None)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    trained = "" if objective is None else f" with {type(objective).__name__}"
    data = type(patient.data).__name__
    return f"{type(network).__name__}, {millions:.2f} M parameters,{trained} on {data} in {patient.trainer.precision}"
