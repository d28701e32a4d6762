"""Errors by which parts refuse what they are given, as findings of a report."""

from __future__ import annotations

from typing import NamedTuple

from lightning_diffusion.analysis.findings import Finding, Section, Severity
from lightning_diffusion.analysis.report import Report
from lightning_diffusion.commands.errors import explain, origin


class _Refusal(NamedTuple):
    check: str
    title: str
    remedy: str = ""


_KNOWN = {
    ("preconditioning", "check"): _Refusal(
        "singular", "The target loses the data at zero terminal SNR.", "model.objective.init_args.target: V"
    ),
    ("module", "_check_parts"): _Refusal(
        "sigma-data", "Parts of the module do not fit each other.", "model.representation: Standardize"
    ),
    ("densities", "check"): _Refusal(
        "sampler-range",
        "Training draws none of the levels that sampling passes through.",
        "model.objective.init_args.density: LogNormalSigma",
    ),
    ("representation", "channel_moments"): _Refusal(
        "constant", "Images are constant: there is nothing to learn from them."
    ),
    ("checks", "_check_range"): _Refusal("range", "Images are outside of [-1, 1]."),
    ("checks", "_check_type"): _Refusal("range", "Images are integers, expected floating point in [-1, 1]."),
    ("checks", "_check_shape"): _Refusal("size", "Images have not the network's shape."),
    ("checks", "_check_finite"): _Refusal("nan", "Images hold NaN or infinity."),
    ("checks", "_check_labels"): _Refusal("labels", "Labels do not fit the network."),
    ("checks", "check_encoded"): _Refusal("size", "The representation has not the network's shape."),
}
"""By the module and function that raise."""


def refused(error: BaseException) -> Finding | None:
    """The finding that an error meant for the user is; None for any other."""
    said = explain(error)
    if said is None:
        return None
    unknown = _Refusal("runs", "The run stops with an error.")
    check, title, remedy = _KNOWN.get(_place(error), unknown)
    return Finding(check, Severity.ERROR, title, said, remedy)


def refusal_of_configuration(error: BaseException) -> Report | None:
    """The report of a configuration that one of its parts refuses; None for other errors, also of spelling."""
    finding = refused(error) if _place(error) in _KNOWN else None
    if finding is None:
        return None
    section = Section("configuration", (finding,))
    return Report("A configuration that is refused before anything is trained", (section,), cannot_run=True)


def _place(error: BaseException) -> tuple[str, str]:
    """Module without the package, and function, that raised."""
    trace = origin(error).__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "", ""
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.removeprefix("lightning_diffusion."), trace.tb_frame.f_code.co_name
