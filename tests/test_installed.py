"""The commands from the built wheel, as processes, in another folder."""

import re
import signal
import subprocess

import numpy as np
import pytest
import torch
from commands import command, line, write_config

pytestmark = pytest.mark.slow


@pytest.fixture
def run(installed, tmp_path):
    write_config(tmp_path)

    def run(*arguments):
        return command(*arguments, cwd=tmp_path, env=installed)

    return run


def test_the_wheel_is_what_is_tested(installed, tmp_path):
    script = "import lightning_diffusion, lightning_diffusion.callbacks as c; print(lightning_diffusion.__file__, c)"
    said = subprocess.run(
        [line()[0], "-c", script], cwd=tmp_path, env=installed, capture_output=True, text=True, check=True
    ).stdout
    assert said.count(installed["PYTHONPATH"]) == 2


def test_a_run_is_trained_stopped_resumed_and_sampled(run, installed, tmp_path):
    options = ["--trainer.max_steps", "400", "--trainer.log_every_n_steps", "1"]
    with subprocess.Popen(
        line("fit", "--config", "tiny.yaml", *options),
        cwd=tmp_path,
        env=installed,
        stdout=subprocess.PIPE,
        text=True,
    ) as training:
        assert "Training UNet" in training.stdout.readline()
        first_picture = tmp_path / "runs" / "tiny-1" / "metrics.csv"
        while training.poll() is None and not first_picture.exists():
            pass
        training.send_signal(signal.SIGTERM)
        said = training.stdout.read()
    assert training.returncode == 143
    stopped = int(re.search(r"Stopped at (\d+) steps", said)[1])
    assert 0 < stopped < 400
    resumed = run("fit", "--resume", "runs/tiny-1", "--trainer.max_steps", str(stopped + 2))
    assert resumed.returncode == 0, resumed.stderr
    assert f"changed  trainer.max_steps: 400 -> {stopped + 2}" in resumed.stdout
    checkpoint = tmp_path / "runs" / "tiny-1" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == stopped + 2
    drawn = run("sample", "--checkpoint", "runs/tiny-1", "--num", "4", "--out", "a.npz")
    assert drawn.returncode == 0, drawn.stderr
    assert "ema weights" in drawn.stdout
    assert np.load(tmp_path / "a.npz")["images"].shape == (4, 1, 8, 8)


def test_a_mistake_is_one_line_and_status_2(run):
    ended = run("fit", "--config", "tiny.yaml", "--trainer.max_step", "3")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "lightning-diffusion: unknown option --trainer.max_step; did you mean --trainer.max_steps?\n"
    )
