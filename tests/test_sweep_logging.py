"""The curve of an EMA sweep, read back from W&B, TensorBoard and the CSV of the run that was swept."""

import csv
import os

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_records import history, records

from lightning_diffusion.commands.loggers import TENSORBOARD_FOLDER, WANDB_ID
from lightning_diffusion.commands.sweep_logging import CURVE, Sweep, log_sweep

WANDB = {
    "class_path": "lightning.pytorch.loggers.WandbLogger",
    "init_args": {"project": "p", "log_model": True},
}
SWEEP = Sweep("frechet_pca_2000", 30, 0.75, {0.05: 0.5, 0.1: 0.25, 0.2: 0.375})
NAMES = {f"ema_sweep/frechet_pca_2000/{name}" for name in ("online", "0.05", "0.1", "0.2")}


def run_folder(where, **known):
    folder = where / "runs" / "tiny-1"
    (folder / "events").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"logger": [WANDB]}}))
    for name, content in known.items():
        (folder / {"wandb": WANDB_ID, "tensorboard": TENSORBOARD_FOLDER}[name]).write_text(content)
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(folder / "curve.png")
    return folder


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder of a run that W&B and TensorBoard know, after a sweep."""
    where = tmp_path_factory.mktemp("swept")
    folder = run_folder(where, wandb="abc123", tensorboard=str(where / "runs" / "tiny-1" / "events"))
    before = {name: os.environ.get(name) for name in ("WANDB_MODE", "WANDB_SILENT")}
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    try:
        log_sweep(folder, SWEEP, folder / "curve.png")
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    return folder


def test_wandb_goes_on_with_the_run_and_has_the_curve(told):
    found = records(told.parent / "wandb")
    (started,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (started.run_id, started.project) == ("abc123", "p")
    logged = {name: value for row in history(found) for name, value in row.items()}
    assert {name: logged[name] for name in NAMES} == SWEEP.scalars
    assert logged["trainer/global_step"] == 30
    assert any(name.startswith("ema_sweep/frechet_pca_2000") and "table" in name for name in logged)
    (picture,) = (told.parent / "wandb").rglob("media/images/ema_sweep*.png")
    assert (np.asarray(Image.open(picture).convert("RGB")) == 200).all()


def test_tensorboard_has_the_same_scalars_in_the_same_folder(told):
    events = EventAccumulator(str(told / "events"))
    events.Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert {n: v for n, v in found.items() if n != "epoch"} == {
        n: [(30, v)] for n, v in SWEEP.scalars.items()
    }
    assert events.Tags()["images"] == ["ema_sweep"]


def test_sweeps_add_rows_and_columns_to_the_csv(told):
    folder = run_folder(told.parent / "other")
    log_sweep(folder, SWEEP, folder / "curve.png")
    log_sweep(folder, SWEEP._replace(metric="val_loss", step=60), folder / "curve.png")
    first, second = csv.DictReader((folder / CURVE).open())
    assert first.keys() == {"step"} | NAMES | {name.replace("frechet_pca_2000", "val_loss") for name in NAMES}
    assert {name: float(value) for name, value in first.items() if value} == SWEEP.scalars | {"step": 30}
    assert (second["step"], second["ema_sweep/val_loss/0.1"]) == ("60", "0.25")
    assert set(csv.DictReader((told / CURVE).open()).fieldnames) == {"step"} | NAMES


def test_a_logger_that_refuses_costs_a_warning(tmp_path):
    folder = run_folder(tmp_path, tensorboard=str(tmp_path / "gone"))
    with pytest.warns(UserWarning, match=r"ema_sweep\.csv; a logger refused it: .*gone.* not there any more"):
        log_sweep(folder, SWEEP, folder / "curve.png")
    assert (folder / CURVE).is_file()
