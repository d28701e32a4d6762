"""The doctor's frame: what it reads, how it reports, and that it leaves everything as it was."""

import json

import pytest
import torch
from commands import files_in
from small_module import module

from lightning_diffusion.analysis import doctor, examinations
from lightning_diffusion.analysis.findings import Examination, Finding, Section, Severity, Table
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.report import Report
from lightning_diffusion.analysis.trainer_settings import TrainerSettings
from lightning_diffusion.cli import main
from lightning_diffusion.commands.doctor import bytes_of
from lightning_diffusion.datamodules import DigitsDataModule

NOTE = Finding("a", Severity.NOTE, "a note", "1")
WARNING = Finding("b", Severity.WARNING, "a warning", "2")
ERROR = Finding("c", Severity.ERROR, "an error", "3", "x: 1")


class Drawing(Examination):
    name = "memory"

    def __call__(self, patient):
        torch.rand(3)
        return Section(self.name, (NOTE, ERROR), (Table("t", ("", "n"), (("row", "1"),)),))


def patient(**arguments):
    return Patient(module(), DigitsDataModule(batch_size=16), TrainerSettings({"max_epochs": 2}), **arguments)


def test_findings_come_the_worst_first_and_once():
    report = Report("x", (Section("one", (NOTE, WARNING)), Section("two", (ERROR, WARNING))))
    assert [finding for _, finding in report.findings] == [ERROR, WARNING, NOTE]


@pytest.mark.parametrize(("findings", "status"), [((), 0), ((NOTE,), 0), ((WARNING,), 1), ((NOTE, ERROR), 1)])
def test_the_status_is_1_above_a_note(findings, status):
    assert Report("x", (Section("one", findings),)).status == status


def test_generators_are_as_before(monkeypatch):
    monkeypatch.setattr(doctor, "chosen", lambda only: [Drawing()])
    ill = patient()
    before = torch.get_rng_state()
    report = doctor.examine(ill)
    assert torch.equal(torch.get_rng_state(), before)
    assert json.loads(report.to_json())["findings"][0]["title"] == "an error"


def test_errors_meant_for_the_user_are_findings(monkeypatch):
    class Refusing(Drawing):
        def __call__(self, patient):
            return Patient(patient.module, patient.data, steps=0)

    monkeypatch.setattr(doctor, "chosen", lambda only: [Refusing()])
    ((_, finding),) = doctor.examine(patient()).findings
    assert finding.severity is Severity.ERROR
    assert "Found 0 steps" in finding.evidence


def test_a_patient_draws_batches_and_counts_steps():
    ill = patient(steps=3)
    assert [len(batch["image"]) for batch in ill.batches()] == [16] * 3
    assert ill.total_steps == 2 * len(ill.data.train_dataloader())
    assert ill.module.representation.needs_measuring
    assert not ill.prepared().representation.needs_measuring


def test_settings_count_devices_on_all_nodes():
    settings = TrainerSettings({"devices": [0, 1], "num_nodes": 3, "precision": "bf16"})
    assert (settings.devices, settings.precision, settings.max_steps) == (6, "bf16-mixed", None)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("1.5 GiB", 1.5 * 2**30), ("100", 100), ("2mb", 2e6)]
)
def test_sizes(text, size):
    assert bytes_of(text) == size


def test_an_unreadable_size_is_refused():
    with pytest.raises(ValueError, match="--memory much: expected a size such as 24GB"):
        bytes_of("much")


def test_an_unknown_examination_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"no examination 'memmory'; did you mean memory\?"):
        examinations.chosen(["memmory"])


MISTAKES = [
    (["doctor"], "needs --config"),
    (["doctor", "--config", "tiny.yaml", "--only", "memry"], "did you mean memory?"),
    (["doctor", "--config", "tiny.yaml", "--jsn", "x"], "did you mean --json?"),
    (["doctor", "--config", "nowhere.yaml"], "does not exist"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[" ".join(m[0][1:]) for m in MISTAKES])
def test_a_mistake_gets_one_line(folder, capsys, arguments, expected):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_the_command_prints_writes_and_leaves_no_folder(folder, capsys):
    line = ["doctor", "--config", "tiny.yaml", "--only", "memory", "--memory", "1MB", "--json", "report.json"]
    assert main(line) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said
    assert "as configured" in said
    assert json.loads((folder / "report.json").read_text())["status"] == 1
    assert files_in(folder) == {"tiny.yaml", "report.json"}
