"""The picture of docs/precision.md: magnitudes of the digits' network in float16, layer by layer.

python benchmarks/audit_picture.py docs/images/precision_audit.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_diffusion import DiffusionPrecision
from lightning_diffusion.analysis.magnitude_chart import magnitude_chart
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.precision_examination import examine_precision

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "digits.yaml"


def main(target: str) -> None:
    """Audit three steps of configs/digits.yaml in 16-mixed, print what is found, draw."""
    patient = Patient.from_config([CONFIG])
    with patient.undisturbed():
        report = examine_precision(patient.module, patient.data, DiffusionPrecision("16-mixed"))
    print(*(report.findings or ["nothing found"]), sep="\n")
    magnitude_chart(report).savefig(target)


if __name__ == "__main__":
    main(sys.argv[1])
