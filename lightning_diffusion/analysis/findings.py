"""What an examination says: findings, tables and pictures in a section."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from lightning_diffusion.analysis.patient import Patient


class Severity(StrEnum):
    """How bad a finding is: an error spoils the run, a warning costs quality or time, a note is worth knowing."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        check: what was looked at, the same name in every run, such as "terminal-snr".
        severity: how bad it is.
        title: one sentence.
        evidence: the numbers that say so.
        remedy: the line of YAML that mends it, empty if there is none.
    """

    check: str
    severity: Severity
    title: str
    evidence: str
    remedy: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header of the same length."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A picture that is drawn when it is wanted.

    Args:
        title: what it shows.
        draw: takes whether it goes on a dark page; returns a matplotlib Figure, a PIL Image, or the bytes of a PNG.
    """

    title: str
    draw: Callable[[bool], Figure | Image | bytes]

    def png(self, dark: bool = False) -> bytes:
        """The bytes of a PNG."""
        from lightning_diffusion.plots import dark_paper, style

        with dark_paper() if dark else nullcontext():
            drawn = self.draw(dark)
            if isinstance(drawn, bytes):
                return drawn
            buffer = io.BytesIO()
            save = drawn.savefig if hasattr(drawn, "savefig") else drawn.save
            with style():
                save(buffer, format="png")
        return buffer.getvalue()


@dataclass(frozen=True)
class Section:
    """What one examination found; `name` is the examination's."""

    name: str
    findings: tuple[Finding, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


class Examination(ABC):
    """Looks at a patient, by drawing from its parts, and leaves it as it was."""

    name: str
    """As `doctor --only` knows it."""

    @abstractmethod
    def __call__(self, patient: Patient) -> Section:
        """Examine; errors meant for the user become a finding of the report."""
