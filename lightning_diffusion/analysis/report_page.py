"""A report as one HTML page that needs nothing else, light or dark as the reader's system is."""

from __future__ import annotations

import base64
from collections import Counter
from html import escape

from lightning_diffusion.analysis.findings import Finding, Picture, Section, Severity, Table
from lightning_diffusion.analysis.report import Report

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1c1f24; --quiet: #5c6470; --line: #dfe3e8;
  --code: #f0f2f5; --error: #b3261e; --warning: #8a5300; --note: #0b5cad; --good: #1b7a3d; }
@media (prefers-color-scheme: dark) { :root { --page: #0e1013; --card: #16181d; --text: #dfe2e7; --quiet: #9aa2ad;
  --line: #2b2f37; --code: #20242b; --error: #ff8a80; --warning: #f2b450; --note: #7fb8ff; --good: #6fd08c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 12px; }
.subject { color: var(--quiet); margin: 0 0 16px; }
.verdict span { display: inline-block; margin-right: 8px; padding: 2px 12px; border-radius: 999px;
  border: 1px solid currentColor; font-weight: 600; }
.error { color: var(--error); } .warning { color: var(--warning); } .note { color: var(--note); }
.good { color: var(--good); }
article { background: var(--card); border: 1px solid var(--line); border-left: 4px solid; border-radius: 8px;
  padding: 12px 16px; margin: 10px 0; }
article.error { border-left-color: var(--error); } article.warning { border-left-color: var(--warning); }
article.note { border-left-color: var(--note); }
article p { color: var(--text); margin: 0; } article .title { font-weight: 600; }
article .kind { font-size: 13px; font-weight: 600; } article .kind small { color: var(--quiet); font-weight: 400;
  margin-left: 8px; }
code { display: block; background: var(--code); color: var(--text); border-radius: 6px; padding: 6px 10px;
  margin-top: 8px; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.section { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; margin: 0;
  flex: 1 1 380px; min-width: 0; overflow-x: auto; }
.card.wide { flex: 1 1 100%; } .card.picture { flex: 1 1 560px; }
.card h3, figcaption { font-size: 14px; font-weight: 600; margin: 0 0 8px; }
img { display: block; max-width: min(100%, 760px); height: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 0 4px 14px; border-top: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--quiet); font-weight: 600; border-top: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
"""


def page(report: Report) -> str:
    """The whole of it; pictures are inside, twice where they look different in the dark."""
    findings = "".join(_finding(name, finding) for name, finding in report.findings)
    sections = "".join(map(_section, report.sections))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>doctor: {escape(report.subject)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>Before training</h1><p class="subject">{escape(report.subject)}</p>'
        f'<p class="verdict">{_verdict(report)}</p>{findings}{sections}</main></body></html>\n'
    )


def _verdict(report: Report) -> str:
    counts = Counter(finding.severity for _, finding in report.findings)
    said = [
        f'<span class="{s}">{counts[s]} {s}{"s" if counts[s] > 1 else ""}</span>'
        for s in Severity
        if counts[s]
    ]
    healthy = '<span class="good">Healthy</span>' if report.status == 0 else ""
    return healthy + "".join(said)


def _finding(name: str, finding: Finding) -> str:
    remedy = f"<code>{escape(finding.remedy)}</code>" if finding.remedy else ""
    place = f"<small>{escape(name)}/{escape(finding.check)}</small>"
    return (
        f'<article class="{finding.severity}"><div class="kind">{finding.severity}{place}</div>'
        f'<p class="title">{escape(finding.title)}</p><p>{escape(finding.evidence)}</p>{remedy}</article>'
    )


def _section(section: Section) -> str:
    parts = [*map(_table, section.tables), *map(_picture, section.pictures)]
    if not any(parts):
        return ""
    return f'<h2>{escape(section.name)}</h2><div class="section">{"".join(parts)}</div>'


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header) if any(table.header) else ""
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in ((), *table.rows) if row
    )
    wide = " wide" if len(table.header) > 4 else ""
    return (
        f'<div class="card{wide}"><h3>{escape(table.title)}</h3><table><tr>{head}</tr>{rows}</table></div>'
        if head
        else f'<div class="card"><h3>{escape(table.title)}</h3><table>{rows}</table></div>'
    )


def _picture(picture: Picture) -> str:
    light, dark = (_embedded(picture.png(dark)) for dark in (False, True))
    source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">' if dark != light else ""
    title = escape(picture.title)
    return (
        f'<figure class="card picture"><figcaption>{title}</figcaption>'
        f'<picture>{source}<img src="{light}" alt="{title}"></picture></figure>'
    )


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
