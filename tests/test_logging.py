"""One short real run with every logger, read back: names are those of docs/logging.md, pictures are not black."""

from __future__ import annotations

import csv
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import write_config
from foreign import QUIET
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from small_module import module
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_records import config, history, records

import lightning_diffusion as ld
from lightning_diffusion.callbacks import LossScaleMonitor
from lightning_diffusion.cli import main
from lightning_diffusion.commands.loggers import TENSORBOARD_FOLDER, WANDB_ID, wandb_run_of
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.environment import environment, git_commit

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "logging.md").read_text()
CALLBACKS = """
  - {class_path: NoiseLevelMonitor, init_args: {low: -4, high: 8, bins: 6}}
  - SpikeGuard
  - GradientSanitizer
  - {class_path: GradientClipping, init_args: {log_layers: true}}
  - {class_path: ModelCheckpoint, init_args: {monitor: val/loss, filename: best}}
"""
OWN = ("_step", "_runtime", "_timestamp", "_wandb", "trainer/global_step")


def table():
    """A pattern for every documented name, and who logs it."""
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", PAGE.partition("## Names")[2], re.MULTILINE)
    holes = {
        "LAYER": r".+",
        "BIN": r"(below_|above_)?-?[\d.]+(_to_-?[\d.]+)?",
        "NAME_EXTRACTOR_NUMBER": r".+",
    }
    for names, by in rows:
        for name in re.findall(r"`([^`]+)`", names):
            pattern = re.escape(name)
            for hole, filled in holes.items():
                pattern = pattern.replace(hole, filled)
            yield pattern, by.strip()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run folder, records of W&B; the CLI in this process, offline."""
    folder, here, argv = tmp_path_factory.mktemp("logged"), os.getcwd(), sys.argv
    write_config(folder)
    (folder / "more.yaml").write_text(f"trainer:\n  callbacks+:{CALLBACKS}")
    text = (ROOT / "configs" / "loggers" / "wandb.yaml").read_text()
    (folder / "wandb.yaml").write_text(text.replace("log_model: false", "log_model: true"))
    files = ["tiny.yaml", "more.yaml", "wandb.yaml", str(ROOT / "configs" / "loggers" / "tensorboard.yaml")]
    os.chdir(folder)
    sys.argv = ["lightning-diffusion"]
    before = {name: os.environ.get(name) for name in ("WANDB_MODE", "WANDB_SILENT")}
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    try:
        arguments = [part for file in files for part in ("--config", file)]
        assert main(["fit", *arguments]) == 0
    finally:
        os.chdir(here)
        sys.argv = argv
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    return folder / "runs" / "tiny-1", records(folder / "runs" / "wandb")


@pytest.fixture(scope="module")
def names(run):
    """Logged by that run, pictures by their own names, and by one in float16."""
    found = {
        re.sub(r"/(_type|count|filenames|format|height|width)$", "", n) for r in history(run[1]) for n in r
    }

    class Names(DummyLogger):
        def log_metrics(self, metrics, step=None):
            found.update(metrics)

    parts = {"callbacks": [LossScaleMonitor()], "plugins": [ld.DiffusionPrecision("16-mixed")]}
    steps = {"max_steps": 2, "log_every_n_steps": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = Trainer(**QUIET | {"logger": Names()} | parts | steps)
    trainer.fit(module(), datamodule=DigitsDataModule(batch_size=16))
    return found - set(OWN)


@pytest.mark.slow
def test_every_name_that_is_logged_is_documented(names):
    patterns = [pattern for pattern, _ in table()]
    strange = [name for name in names if sum(bool(re.fullmatch(p, name)) for p in patterns) != 1]
    assert strange == []


@pytest.mark.slow
def test_every_documented_name_is_logged(names):
    """But for a mixture's floor, the metrics of drawing, and tests, which this run does not have."""
    absent = {"`GenerativeMetrics`", "`ema sweep`"}
    expected = [p for p, by in table() if by not in absent and "floor" not in p and p != "test/loss"]
    assert len(expected) > 20
    assert [p for p in expected if not any(re.fullmatch(p, name) for name in names)] == []


@pytest.mark.slow
def test_csv_has_the_same_scalars(run):
    with (run[0] / "metrics.csv").open() as file:
        columns = set(next(csv.reader(file)))
    logged = {
        name for row in history(run[1]) for name, value in row.items() if isinstance(value, (int, float))
    }
    pictures = {name for name in logged if name.startswith(("samples/", "noise_levels/"))}
    assert logged - set(OWN) - pictures == columns - {"step"}


@pytest.mark.slow
def test_tensorboard_has_the_same_scalars_values_and_pictures(run):
    """In the folder that the run folder names."""
    folder = Path((run[0] / TENSORBOARD_FOLDER).read_text())
    assert folder == run[0].parent / "tensorboard" / "version_0"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    with (run[0] / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(events.Tags()["scalars"]) == rows[0].keys() - {"step"}
    assert set(events.Tags()["images"]) == {"samples", "noise_levels"}
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        written = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(written)


@pytest.mark.slow
def test_values_are_those_of_the_csv(run):
    with (run[0] / "metrics.csv").open() as file:
        written = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert [row["train/loss"] for row in history(run[1]) if "train/loss" in row] == pytest.approx(written)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["samples", "noise_levels"])
def test_pictures_are_not_black_and_are_those_of_the_run_folder(run, name):
    (logged,) = (run[0].parent / "wandb").rglob(f"media/images/{name}*.png")
    (own,) = (run[0] / name).glob("*.png")
    pixels = np.asarray(Image.open(logged).convert("RGB"))
    assert pixels.std() > 20
    assert (pixels == np.asarray(Image.open(own).convert("RGB"))).all()


@pytest.mark.slow
def test_configuration_environment_name_and_best_checkpoint_are_there(run):
    told = config(run[1])
    assert told["config"] == yaml.safe_load((run[0] / "config.yaml").read_text())
    assert told["environment"] == yaml.safe_load((run[0] / "environment.yaml").read_text())
    assert told["environment"]["torch"] == version("torch")
    (started,) = [record.run for record in run[1] if record.WhichOneof("record_type") == "run"]
    assert started.display_name == "tiny-1"
    assert started.run_id == (run[0] / WANDB_ID).read_text()
    (artifact,) = [record.artifact for record in run[1] if record.WhichOneof("record_type") == "artifact"]
    assert artifact.type == "model"
    assert [entry.path for entry in artifact.manifest.contents] == ["model.ckpt"]


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_NAME", raising=False)
    (tmp_path / WANDB_ID).write_text("abc123")
    with wandb_run_of(tmp_path):
        assert os.environ["WANDB_RUN_ID"] == "abc123"
        assert os.environ["WANDB_NAME"] == tmp_path.name
    assert "WANDB_RUN_ID" not in os.environ
    assert "WANDB_NAME" not in os.environ


@pytest.mark.parametrize(
    ("file", "module_name", "flags", "package"),
    [
        ("wandb", "lightning.pytorch.loggers.wandb", ["_WANDB_AVAILABLE"], "wandb"),
        (
            "tensorboard",
            "lightning.fabric.loggers.tensorboard",
            ["_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"],
            "tensorboard",
        ),
    ],
)
def test_a_missing_logger_is_one_line_that_says_what_to_install(
    file, module_name, flags, package, folder, monkeypatch, capsys
):
    from lightning_utilities.core.imports import RequirementCache

    for flag in flags:
        monkeypatch.setattr(f"{module_name}.{flag}", RequirementCache(f"{package}>=999"))
    status = main(
        ["fit", "--config", "tiny.yaml", "--config", str(ROOT / "configs" / "loggers" / f"{file}.yaml")]
    )
    said = capsys.readouterr().err.strip()
    assert status == 2
    assert said.endswith(f"needs a package that is not installed: pip install {package}")
    assert "\n" not in said


def test_the_environment_names_what_decides_a_run():
    found = environment()
    assert {
        "python",
        "torch",
        "lightning",
        "lightning-diffusion",
        "cpu",
        "cpu_count",
        "platform",
    } <= found.keys()
    assert all(isinstance(value, (str, int)) for value in found.values())


def test_a_commit_is_named_and_changes_are_told(tmp_path):
    import subprocess

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    commit = git_commit(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"
