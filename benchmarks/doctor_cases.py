"""What `lightning-diffusion doctor` says of twelve sick configurations and of every shipped recipe.

python benchmarks/doctor_cases.py [--only data,objective] [--steps 10]

Prints the tables of docs/doctor.md. Six of the twelve are YAML over configs/digits.yaml, six are made in Python. A case
counts as found if its own finding is among the first three of the report, in the order in which it is printed.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_diffusion as ld
from lightning_diffusion.analysis.doctor import examine
from lightning_diffusion.analysis.findings import Severity
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.refusals import refusal_of_configuration
from lightning_diffusion.analysis.report import Report
from lightning_diffusion.analysis.trainer_settings import TrainerSettings
from lightning_diffusion.callbacks import PowerFunctionEMA
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.targets import Space

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DIGITS = CONFIGS / "digits.yaml"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
FIRST = 3


class Steep(ld.Weighting):
    """w = sqrt(SNR)^3 on the residual, uncapped."""

    space = Space.RESIDUAL

    def __call__(self, level: ld.NoiseLevel, setting: Any) -> Tensor:
        return level.snr**1.5


class Case(NamedTuple):
    """A sickness: YAML over the digits' configuration, or a patient made in Python; the check that has to find it."""

    name: str
    check: str
    yaml: str = ""
    made: Callable[[int], Patient] | None = None

    @property
    def origin(self) -> str:
        """Where it was written."""
        return "YAML" if self.yaml else "Python"


def images() -> Tensor:
    """The digits in [-1, 1], (1437, 1, 8, 8)."""
    data = DigitsDataModule()
    return torch.cat([batch["image"] for batch in data.train_dataloader()])


def patient(x: Tensor, steps: int, **parts: Any) -> Patient:
    """A small network on a loader of images (N, C, H, W)."""
    torch.manual_seed(0)
    network = ld.UNet(tuple(x.shape[1:]), channels=24, num_blocks=1, attention_levels=())
    module = ld.DiffusionModule(network, **{"representation": ld.Standardize(), **parts})
    loader: Any = DataLoader(TensorDataset(x), 64, shuffle=True, collate_fn=stacked)
    settings = TrainerSettings({"max_steps": 2000, "callbacks": [PowerFunctionEMA()]})
    return Patient(module, loader, settings, steps)


def stacked(samples: Sequence[tuple[Tensor]]) -> Tensor:
    """A batch of images."""
    return torch.stack([x for (x,) in samples])


def latents() -> Tensor:
    """As an autoencoder leaves them: deviations of 2 to 9 by channel, means of up to 3."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 4, 8, 8, generator=generator)
    scale, shift = torch.tensor([2.0, 4.0, 6.0, 9.0]), torch.tensor([0.5, -1.0, 3.0, 0.0])
    return x * scale[:, None, None] + shift[:, None, None]


def narrow(steps: int) -> Patient:
    """Trained from log-SNR -2 to 4, sampled from sigma 80 to 0.002."""
    return patient(images(), steps, objective=ld.EDM(density=ld.Truncated(ld.LogNormalSigma(), -2.0, 4.0)))


GUIDED = """
model: {label_dropout: 0.0}
trainer:
  callbacks+:
    class_path: GenerativeMetrics
    init_args: {num_samples: 64, guidance: {class_path: ClassifierFree, init_args: {scale: 2.0}}}
"""

CASES = (
    Case(
        "wrong sigma_data",
        "sigma-data",
        "model: {objective: {class_path: EDM, init_args: {sigma_data: 0.1}}, representation: Identity}",
    ),
    Case("data in [0, 1]", "range", made=lambda steps: patient((images() + 1) / 2, steps)),
    Case("data in [0, 255]", "range", made=lambda steps: patient((images() + 1) * 127.5, steps)),
    Case(
        "epsilon with zero terminal SNR",
        "singular",
        "model: {objective: {class_path: DDPM, init_args: {schedule: {class_path: LinearSchedule, init_args: "
        "{zero_terminal_snr: true}}}}, representation: {class_path: Standardize, init_args: {sigma_data: 1.0}}}",
    ),
    Case(
        "a weight that spans 1e8",
        "weight-span",
        made=lambda steps: patient(images(), steps, objective=ld.EDM(weighting=Steep())),
    ),
    Case(
        "log-normal centred far off",
        "idle-draws",
        "model: {objective: {class_path: EDM, init_args: {density: {class_path: LogNormalSigma, init_args: "
        "{mean: 5.0}}}}}",
    ),
    Case("float16 without scaling", "loss-scaling", "trainer: {precision: 16-true}"),
    Case(
        "an average longer than the run",
        "average-length",
        "trainer: {callbacks: [{class_path: EMA, init_args: {decay: 0.9999}}]}",
    ),
    Case("sampler outside the trained range", "sampler-range", made=narrow),
    Case("label dropout 0 with guidance", "label-dropout", GUIDED),
    Case(
        "unnormalised latents",
        "sigma-data",
        made=lambda steps: patient(latents(), steps, representation=ld.Identity(bounded=False)),
    ),
    Case("constant images", "constant", made=lambda steps: patient(torch.zeros(512, 1, 8, 8), steps)),
)


def report_of(case: Case, only: Sequence[str] | None = None, steps: int = 10) -> Report:
    """The doctor's report of a case."""
    if case.made is not None:
        return examine(case.made(steps), only)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sick.yaml")
        path.write_text(case.yaml)
        return configured([DIGITS, path], only, steps)


def configured(paths: Sequence[Path], only: Sequence[str] | None = None, steps: int = 10) -> Report:
    """As the command does, one that is refused included."""
    try:
        return examine(Patient.from_config(paths, steps=steps), only)
    except Exception as error:
        report = refusal_of_configuration(error)
        if report is None:
            raise
        return report


def place(report: Report, check: str) -> int | None:
    """Of the first finding of a check, from 1; None if there is none above a note."""
    found = [f.check for _, f in report.findings if f.severity is not Severity.NOTE]
    return found.index(check) + 1 if check in found else None


def sick_row(case: Case, report: Report) -> str:
    """A line of the table."""
    found = place(report, case.check)
    named = [f for _, f in report.findings if f.check == case.check]
    said = (
        f"{named[0].severity}: {named[0].title} ({shorten(named[0].evidence, 140)})" if named else "not found"
    )
    return f"| {case.name} | {case.origin} | `{case.check}` | {found or 'none'} | {said} |"


def healthy_row(name: str, report: Report) -> str:
    """A line of the table."""
    counts = [
        sum(f.severity is s for _, f in report.findings)
        for s in (Severity.ERROR, Severity.WARNING, Severity.NOTE)
    ]
    above = [f"`{f.check}`: {f.evidence}" for _, f in report.findings if f.severity is not Severity.NOTE]
    return f"| {name} | {' | '.join(map(str, counts))} | {'; '.join(above) or ''} |"


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="these examinations")
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    only = given.only.split(",") if given.only else None
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| sick configuration | made in | finding | place | what the doctor says |\n|---|---|---|---|---|")
    for case in CASES:
        print(sick_row(case, report_of(case, only, given.steps)), flush=True)
    print("\n| configs/digits.yaml with | errors | warnings | notes | above a note |\n|---|---|---|---|---|")
    print(healthy_row("nothing else", configured([DIGITS], only, given.steps)), flush=True)
    for recipe in RECIPES:
        print(
            healthy_row(f"recipes/{recipe.name}", configured([DIGITS, recipe], only, given.steps)), flush=True
        )


if __name__ == "__main__":
    main()
