"""The sections of a whole examination, as text for people and machines; what `--json` writes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from lightning_diffusion.analysis.findings import Finding, Section, Severity

HEALTHY, FINDINGS, CANNOT_RUN = 0, 1, 2
"""Exit status of `doctor`; 2 is also that of a configuration that cannot be read."""


@dataclass(frozen=True)
class Report:
    """What was found, by examination, in a fixed order.

    Args:
        subject: what was examined, in a line.
        sections: one for each examination.
        cannot_run: whether the configuration is refused, so that nothing could be drawn from it.
    """

    subject: str
    sections: tuple[Section, ...]
    cannot_run: bool = False

    @property
    def findings(self) -> list[tuple[str, Finding]]:
        """(examination, finding), the worst first; what several examinations say in the same words only once."""
        found = [(section.name, finding) for section in self.sections for finding in section.findings]
        once: dict[tuple[str, str, str], tuple[str, Finding]] = {}
        for name, f in found:
            once.setdefault((f.check, f.title, f.evidence), (name, f))
        return sorted(once.values(), key=lambda pair: pair[1].severity.rank)

    @property
    def status(self) -> int:
        """0 if nothing is above a note, else 1; 2 if it cannot run."""
        if self.cannot_run:
            return CANNOT_RUN
        above = any(finding.severity is not Severity.NOTE for _, finding in self.findings)
        return FINDINGS if above else HEALTHY

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, which are there by their titles."""
        findings = [{"examination": name, **asdict(finding)} for name, finding in self.findings]
        return {
            "subject": self.subject,
            "status": self.status,
            "findings": findings,
            "sections": [_section(section) for section in self.sections],
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


def _section(section: Section) -> dict[str, Any]:
    tables = [asdict(table) for table in section.tables]
    pictures = [picture.title for picture in section.pictures]
    return {"name": section.name, "tables": tables, "pictures": pictures}
