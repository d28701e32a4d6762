"""The examinations of `lightning-diffusion doctor`, in the order of the report; each is imported when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from lightning_diffusion.commands.errors import suggestion

if TYPE_CHECKING:
    from lightning_diffusion.analysis.findings import Examination

EXAMINATIONS: dict[str, str] = {
    "data": "DataExamination",
    "objective": "ObjectiveExamination",
    "conditioning": "ConditioningExamination",
    "precision": "PrecisionExamination",
    "memory": "MemoryExamination",
    "averages": "AveragesExamination",
    "time": "TimeExamination",
}
"""Name, which is that of a module in this folder, to the class in it."""


def chosen(only: Sequence[str] | None = None) -> list[Examination]:
    """The examinations of these names, all if None, in the order of the report.

    Raises:
        ValueError: for a name that there is not.
    """
    for name in only or ():
        if name not in EXAMINATIONS:
            raise ValueError(
                f"there is no examination {name!r}{suggestion(name, EXAMINATIONS)} There are {', '.join(EXAMINATIONS)}."
            )
    return [_made(name) for name in EXAMINATIONS if only is None or name in only]


def _made(name: str) -> Examination:
    made: Examination = getattr(import_module(f"{__name__}.{name}"), EXAMINATIONS[name])()
    return made
