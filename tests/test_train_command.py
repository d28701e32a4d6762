"""fit, validate and predict: runs in folders of their own that stop and go on."""

import csv
import os
import signal

import numpy as np
import pytest
import torch
import yaml
from commands import files_in
from PIL import Image

from lightning_diffusion.callbacks import LastCheckpoint
from lightning_diffusion.cli import main


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_leaves_everything_in_its_folder_and_says_where(trained, capsys):
    found = files_in(trained)
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "samples/step=000006.png"} <= found
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert (config["seed_everything"], config["trainer"]["max_steps"]) == (1, 6)
    assert config["model"]["optimizer"]["init_args"]["lr"] == 2e-3
    assert config["model"]["optimizer"]["init_args"]["fused"] is True
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert any(row["train/loss"] for row in rows)
    assert any(row["val/loss"] for row in rows)


def test_every_run_has_a_new_folder_and_a_summary(folder, capsys):
    for number, arguments in ((1, []), (2, []), (1, ["--name", "other"])):
        assert main(["fit", "--config", "tiny.yaml", "--trainer.max_steps", "2", *arguments]) == 0
        run = f"runs/{'other' if arguments else 'tiny'}-{number}"
        said = capsys.readouterr().out
        assert "Finished 2 steps" in said
        for place in ("samples/step=000002.png", "checkpoints/last.ckpt", "metrics.csv", "config.yaml"):
            assert f"{run}/{place}" in said
        assert f"sample --checkpoint {run}" in said


def test_a_fast_development_run_leaves_nothing(folder):
    assert main(["fit", "--config", "tiny.yaml", "--trainer.fast_dev_run", "true"]) == 0
    assert files_in(folder) == {"tiny.yaml"}


def test_the_resolved_configuration_trains_the_same(trained, folder):
    assert main(["fit", "--config", str(trained / "config.yaml"), "--name", "again"]) == 0
    first, second = weights(trained)["state_dict"], weights(folder / "runs" / "again-1")["state_dict"]
    assert all(torch.equal(first[name], second[name]) for name in first)


def stop_at(step, number):
    def send(self, trainer, *_):
        if trainer.global_step == step:
            os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_exactly(trained, folder, monkeypatch, capsys, number, status):
    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_start", stop_at(2, number))
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", "tiny.yaml"])
    assert stop.value.code == status
    said = capsys.readouterr().out
    assert "Stopped at 3 steps" in said
    assert "lightning-diffusion fit --resume runs/tiny-1" in said
    run = folder / "runs" / "tiny-1"
    assert weights(run)["global_step"] == 3
    assert main(["fit", "--resume", "runs/tiny-1"]) == 0
    assert "changed" not in capsys.readouterr().out
    resumed, straight = weights(run), weights(trained)
    for name, value in straight["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    assert {"config-1.yaml", "config.yaml", "metrics-1.csv", "metrics.csv"} <= files_in(run)
    assert Image.open(run / "samples/step=000006.png") == Image.open(trained / "samples/step=000006.png")


def test_on_resume_the_command_line_wins_and_says_so(folder, capsys):
    assert main(["fit", "--config", "tiny.yaml", "--trainer.max_steps", "2"]) == 0
    capsys.readouterr()
    checkpoint = "runs/tiny-1/checkpoints/last.ckpt"
    assert (
        main(["fit", "--resume", checkpoint, "--trainer.max_steps", "4", "--model.optimizer.lr", "0.5"]) == 0
    )
    said = capsys.readouterr().out
    assert "changed  trainer.max_steps: 2 -> 4" in said
    assert "changed  model.optimizer.init_args.lr: 0.002 -> 0.5" in said
    saved = weights(folder / "runs" / "tiny-1")
    assert saved["global_step"] == 4
    assert saved["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.5


def test_resuming_with_another_network_is_refused_before_anything_is_touched(trained, folder, capsys):
    before = files_in(trained)
    assert main(["fit", "--resume", str(trained), "--model.network.channels", "16"]) == 2
    assert "last.ckpt is of another network" in capsys.readouterr().err
    assert files_in(trained) == before


def test_validation_and_prediction_need_only_the_run(trained, folder, capsys):
    assert main(["validate", "--checkpoint", str(trained)]) == 0
    assert "val/loss" in capsys.readouterr().out
    assert main(["predict", "--checkpoint", str(trained), "--trainer.limit_predict_batches", "1"]) == 0
    assert np.load(folder / "predictions.npz")["images"].shape == (32, 1, 8, 8)
    assert files_in(folder) == {"tiny.yaml", "predictions.npz"}
