"""A report in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table as RichTable

from lightning_diffusion.analysis.findings import Finding, Severity, Table
from lightning_diffusion.analysis.report import Report

_COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}
_WIDTH_OF_FILES = 110


def show(report: Report, console: Console | None = None) -> None:
    """Print tables by examination, then all findings, the worst first: what matters most is seen last to scroll."""
    console = console or Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
    console.print(f"[bold]{escape(report.subject)}[/bold]", highlight=False)
    for section in report.sections:
        for table in section.tables:
            console.print(_table(section.name, table))
    for name, finding in report.findings:
        console.print()
        for line in _lines(name, finding):
            console.print(line, highlight=False)
    console.print(f"\n{_verdict(report)}", highlight=False)


def _table(name: str, table: Table) -> RichTable:
    shown = RichTable(title=f"{name}: {table.title}", title_justify="left", title_style="bold", box=None)
    for number, column in enumerate(table.header):
        shown.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown


def _lines(name: str, finding: Finding) -> Iterable[str | Padding]:
    colour = _COLOURS[finding.severity]
    yield f"[{colour}]{finding.severity}[/{colour}]  {escape(finding.title)}  [dim]{name}/{finding.check}[/dim]"
    yield Padding(escape(finding.evidence), (0, 0, 0, 4))
    if finding.remedy:
        yield Padding(f"[bold]write[/bold]  {escape(finding.remedy)}", (0, 0, 0, 4))


def _verdict(report: Report) -> str:
    counts = {s: sum(f.severity is s for _, f in report.findings) for s in Severity}
    said = ", ".join(f"{n} {s}{'s' if n > 1 else ''}" for s, n in counts.items() if n)
    return said or "Healthy: nothing was found."
