"""doctor: what is wrong with a configuration, before it is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diffusion.analysis.examinations import EXAMINATIONS, chosen
from lightning_diffusion.commands.parser import Parser

if TYPE_CHECKING:
    from lightning_diffusion.analysis.report import Report

_EXAMPLES = f"""\
  --model..., --data..., --trainer...   any key of the configuration, as for fit

examinations: {", ".join(EXAMINATIONS)}

examples:
  lightning-diffusion doctor --config configs/digits.yaml
  lightning-diffusion doctor --config configs/images.yaml --only memory --memory 24GB --data.batch_size 128
  lightning-diffusion doctor --config configs/digits.yaml --html report.html

Exit status: 0 healthy, 1 findings, 2 cannot be examined. Nothing is written but the files that are asked for."""

_UNITS = {"": 1, "B": 1, **{u: 1000 ** (i + 1) for i, u in enumerate(("KB", "MB", "GB", "TB"))}}
_UNITS |= {u: 1024 ** (i + 1) for i, u in enumerate(("KIB", "MIB", "GIB", "TIB"))}


def run(command: str, arguments: list[str]) -> int:
    """Examine, print, write; returns the exit status."""
    parser = _parser()
    own, others = parser.parse_known_args(arguments)
    if own.config is None:
        raise ValueError("doctor needs --config FILE")
    only = None if own.only is None else own.only.split(",")
    chosen(only)
    memory = None if own.memory is None else bytes_of(own.memory)
    from lightning_diffusion.commands.doctor_text import show

    known = [option for option in parser._option_string_actions if option.startswith("--")]
    report = _report((own.config, others, own.steps, memory, known), only)
    show(report)
    for name, write in WRITERS.items():
        if getattr(own, name) is not None:
            write(report, Path(getattr(own, name)))
    return report.status


def _parser() -> Parser:
    parser = Parser("doctor", "Examine a configuration before it is trained.", _EXAMPLES)
    add = parser.add_argument
    add(
        "--config",
        "-c",
        action="append",
        metavar="FILE",
        help="YAML as for fit; several are merged, later ones win",
    )
    add("--only", metavar="NAME[,NAME...]", help="these examinations (all)")
    add("--steps", type=int, default=50, metavar="N", help="training steps an examination may take (50)")
    add(
        "--memory",
        metavar="SIZE",
        help="what a device has, such as 24GB or 80GiB (that of this machine's GPU)",
    )
    add("--json", metavar="FILE", help="the report for machines")
    add("--html", metavar="FILE", help="the report as one page with its pictures")
    return parser


def bytes_of(text: str) -> int:
    """`80GB` as a number of bytes: GB is 10^9, GiB is 2^30.

    Raises:
        ValueError: for anything else than a positive number and such a unit.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or match[1].count(".") > 1 or float(match[1]) <= 0:
        raise ValueError(f"--memory {text}: expected a size such as 24GB or 80GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _report(configuration: Any, only: list[str] | None) -> Report:
    """Of the arguments of `Patient.from_config`; a configuration that a part refuses has one finding."""
    from lightning_diffusion.analysis.patient import Patient
    from lightning_diffusion.analysis.refusals import refusal_of_configuration

    try:
        patient = Patient.from_config(*configuration)
    except Exception as error:
        report = refusal_of_configuration(error)
        if report is None:
            raise
        return report
    return _examined(patient, only)


def _examined(patient: Any, only: list[str] | None) -> Report:
    from lightning_diffusion.analysis.doctor import examine
    from lightning_diffusion.waiting import Waiting

    with Waiting(len(chosen(only)), "examinations") as waiting:
        return examine(patient, only, lambda name: waiting.advance(1))


def _write_json(report: Report, path: Path) -> None:
    from lightning_diffusion.io import write_atomically

    write_atomically(path, lambda file: file.write(report.to_json().encode()))
    print(f"  json  {path}", flush=True)


def _write_page(report: Report, path: Path) -> None:
    from lightning_diffusion.analysis.report_page import page
    from lightning_diffusion.io import write_atomically

    text = page(report)
    write_atomically(path, lambda file: file.write(text.encode()))
    print(f"  html  {path}", flush=True)


WRITERS: Mapping[str, Callable[[Report, Path], None]] = {"json": _write_json, "html": _write_page}
"""What writes a report into the file of the option of that name."""
