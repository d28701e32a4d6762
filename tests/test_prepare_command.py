"""prepare latents: from a configuration to latents on disk, to a run on them, to its samples."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import files_in

from lightning_diffusion.cli import main
from lightning_diffusion.datamodules import DigitsDataModule, LatentsDataModule
from lightning_diffusion.io import load_checkpoint

LATENT = """\
model:
  network: {class_path: UNet, init_args: {image_shape: [4, 4, 4]}}
  representation: {class_path: LatentRepresentation, init_args: {autoencoder: PatchPCA}}
"""
CONFIGS = ["--config", "tiny.yaml", "--config", "latent.yaml"]


@pytest.fixture
def place(folder):
    (folder / "latent.yaml").write_text(LATENT)
    return folder


def samples(run, out):
    assert main(["sample", "--checkpoint", str(run), "--num", "4", "--out", out]) == 0
    return np.load(out)["images"]


def test_latents_from_a_configuration_train_as_it_does(place, capsys):
    assert main(["prepare", "latents", *CONFIGS, "--out", "latents", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    data = DigitsDataModule()
    sizes = len(data.training_data()), len(data.held_out_data())
    assert f"latents: {sizes[0]} training and {sizes[1]} held-out latents of 4 x 4 x 4, 0.5 MB" in said
    line = next(line for line in said.splitlines() if "  train  " in line).split()[2:]
    assert line == ["fit", *CONFIGS, "--config", "latents/latents.yaml"]
    assert LatentsDataModule("latents", 32).image_shape == (4, 4, 4)
    assert main([*line, "--name", "disk"]) == 0
    assert main(["fit", *CONFIGS, "--name", "images"]) == 0
    shutil.rmtree("latents")
    drawn = samples("runs/disk-1", "disk.npz")
    assert drawn.shape == (4, 1, 8, 8)
    assert (
        np.abs(drawn - samples("runs/images-1", "images.npz")).max() < 0.05
    )  # both measure, one in whole batches


def test_a_run_on_latents_is_resumed(place):
    assert main(["prepare", "latents", *CONFIGS, "--out", "latents", "--batch-size", "500"]) == 0
    line = ["fit", *CONFIGS, "--config", "latents/latents.yaml", "--model.learning_rate", "WarmupConstant"]
    assert main([*line, "--name", "straight"]) == 0
    assert main([*line, "--name", "half", "--trainer.max_steps", "3"]) == 0
    assert main(["fit", "--resume", "runs/half-1", "--trainer.max_steps", "6"]) == 0
    straight, half = (load_checkpoint(f"runs/{name}-1")["state_dict"] for name in ("straight", "half"))
    assert all(torch.equal(straight[name], half[name]) for name in straight)
    config = yaml.safe_load(Path("runs/half-1/config.yaml").read_text())
    assert config["data"]["class_path"].endswith("LatentsDataModule")
    assert config["data"]["init_args"]["batch_size"] == 32


MISTAKES = [
    (["prepare", "latens"], "there is no `prepare latens`; did you mean latents"),
    (["prepare", "latents", *CONFIGS], "--out is needed"),
    (
        ["prepare", "latents", *CONFIGS, "--out", "x", "--batch-sise", "3"],
        "--batch-sise; did you mean --batch-size",
    ),
    (
        ["prepare", "latents", *CONFIGS, "--out", "x", "--batch-size", "0"],
        "--batch-size is 0, expected 1 or more",
    ),
    (
        ["prepare", "latents", *CONFIGS, "--out", "x", "--modle.network", "UNet"],
        "--modle.network; did you mean --model.network",
    ),
    (
        ["prepare", "latents", "--config", "tiny.yaml", "--out", "x"],
        "found model.representation Identity, expected LatentRepresentation",
    ),
    (["prepare", "latents", "--config", "absent.yaml", "--out", "x"], "absent.yaml does not exist"),
    (["prepare", "latents", "--out", "x"], "is needed: give it, or --config FILE"),
    (
        ["fit", *CONFIGS, "--data", "LatentsDataModule", "--data.folder", "x"],
        "x does not exist: give the folder that write_latents wrote",
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_gets_one_line_and_leaves_nothing(place, capsys, arguments, expected):
    before = files_in(place)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert expected in said[0]
    assert files_in(place) == before


def test_what_is_there_is_overwritten_only_when_asked(place, capsys):
    line = ["prepare", "latents", *CONFIGS, "--out", "latents"]
    assert main(line) == 0
    assert main(line) == 2
    assert "latents holds latents already" in capsys.readouterr().err
    assert main([*line, "--overwrite"]) == 0


def test_help(capsys):
    assert main(["prepare", "--help"]) == 0
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "latents", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.count("lightning-diffusion prepare latents") >= 2
