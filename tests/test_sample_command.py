"""What `sample` writes, and what it refuses."""

import re

import numpy as np
import pytest
import torch
from commands import files_in
from PIL import Image

from lightning_diffusion.cli import main


def sampled(trained, out, *arguments):
    assert main(["sample", "--checkpoint", str(trained), "--out", out, *arguments]) == 0
    return np.load(out) if out.endswith(".npz") else None


def test_arrays_hold_images_in_range_and_cycling_labels(trained, folder):
    file = sampled(trained, "a.npz", "--num", "13")
    assert file["images"].dtype == np.float32
    assert file["images"].shape == (13, 1, 8, 8)
    assert np.abs(file["images"]).max() <= 1
    assert file["labels"].tolist() == [*range(10), 0, 1, 2]


def test_labels_samplers_seeds_and_weights_are_obeyed(trained, folder, capsys):
    both = [sampled(trained, f"{i}.npz", "--num", "6", "--label", "3,5", "--label", "7") for i in range(2)]
    assert both[0]["labels"].tolist() == [3, 5, 7, 3, 5, 7]
    assert np.array_equal(both[0]["images"], both[1]["images"])
    for i, others in enumerate(
        (["--seed", "1"], ["--weights", "online"], ["--steps", "5"], ["--guidance", "3"])
    ):
        other = sampled(trained, f"other{i}.npz", "--num", "6", "--label", "3,5,7", *others)
        assert not np.array_equal(both[0]["images"], other["images"])
    capsys.readouterr()
    sampled(trained, "ddim.npz", "--num", "2", "--sampler", "ddim:7")
    assert "ema weights, DDIM(num_steps=7" in capsys.readouterr().out


def test_a_grid_and_single_files(trained, folder):
    sampled(trained, "grid.png", "--num", "20")
    width, height = Image.open("grid.png").size
    assert width > 4 * height
    sampled(trained, "single/", "--num", "12")
    assert sorted(path.name for path in (folder / "single").iterdir())[::11] == [
        "000000-0.png",
        "000011-1.png",
    ]
    assert Image.open("single/000000-0.png").size == (8, 8)


@pytest.mark.parametrize("out", ["a.png", "a.npz", "a/"])
def test_nothing_is_overwritten_unasked(trained, folder, capsys, out):
    sampled(trained, out, "--num", "2")
    assert main(["sample", "--checkpoint", str(trained), "--out", out, "--num", "2"]) == 2
    assert "exists: give another --out, or --overwrite" in capsys.readouterr().err
    sampled(trained, out, "--num", "2", "--overwrite")


BAD_SAMPLES = [
    (["--label", "10"], "--label 10 is no class of this model: expected 0 to 9"),
    (["--weights", "ema:x"], "no average 'x'"),
    (["--weights", "nonsense"], "write online, ema"),
    (["--sampler", "huen"], "no sampler huen; did you mean heun"),
    (["--sampler", "heun:many"], "expected NAME:STEPS such as heun:18"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_SAMPLES, ids=[" ".join(b[0]) for b in BAD_SAMPLES])
def test_what_cannot_be_drawn_is_said(trained, folder, capsys, arguments, expected):
    assert main(["sample", "--checkpoint", str(trained), "--out", "a.npz", *arguments]) == 2
    assert re.search(expected, capsys.readouterr().err)
    assert files_in(folder) == {"tiny.yaml"}


def test_checkpoints_that_are_cut_off_or_foreign_are_named(trained, folder, capsys):
    whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}, "hyper_parameters": {"width": 3}}, folder / "foreign.ckpt")
    for name, expected in (("cut", "is truncated or no checkpoint"), ("foreign", "how to build its network")):
        assert main(["sample", "--checkpoint", f"{name}.ckpt", "--out", "a.npz"]) == 2
        assert re.search(rf"{name}\.ckpt.*{expected}", capsys.readouterr().err)
    assert not (folder / "a.npz").exists()
