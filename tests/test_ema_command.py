"""`lightning-diffusion ema`: from the files of a run to files of weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from commands import CONFIG
from safetensors.torch import load_file
from torch.testing import assert_close

from lightning_diffusion.cli import main
from lightning_diffusion.io import load_checkpoint
from lightning_diffusion.reconstruction import average_checkpoints, reconstruct, snapshots_of


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of 30 steps with a snapshot after every third and two checkpoints."""
    folder = tmp_path_factory.mktemp("ema")
    callbacks = "[{class_path: PostHocEMA, init_args: {every_n_steps: 3}}]"
    config = CONFIG.replace("[PowerFunctionEMA, SampleGrid]", callbacks).replace(
        "max_steps: 6", "max_steps: 30"
    )
    (folder / "tiny.yaml").write_text(config.replace("val_check_interval: 4", "val_check_interval: 30"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "tiny.yaml"]) in (0, None)
    return folder / "runs" / "tiny-1"


def ema(*arguments: object) -> int | None:
    return main(["ema", *map(str, arguments)])


def test_a_kept_average_is_reconstructed_and_fits_the_checkpoint(run, tmp_path, capsys):
    ema("reconstruct", run, "--sigma-rel", "0.05,0.1", "--out", tmp_path / "w.safetensors")
    averages = load_checkpoint(run / "checkpoints" / "last.ckpt")["callbacks"]["EMA"]["averages"]
    for width in ("0.05", "0.1"):
        assert_close(load_file(tmp_path / f"w-{width}.safetensors"), averages[width], rtol=0, atol=1e-6)
    assert len(re.findall("expected error", capsys.readouterr().out)) == 2


def test_earlier_steps_and_the_published_metric(run, tmp_path):
    snapshots = snapshots_of(run)
    out = tmp_path / "w.safetensors"
    ema("reconstruct", run, "--sigma-rel", 0.07, "--at-step", 15, "--metric", "white", "--out", out)
    (want,) = reconstruct(snapshots, [0.07], 15, "white")
    assert_close(load_file(out), want.weights, rtol=0, atol=0)


def test_a_width_out_of_reach_is_warned_of(run, tmp_path, capsys):
    ema("reconstruct", run, "--sigma-rel", 0.02, "--out", tmp_path / "w.safetensors")
    assert "warning: these snapshots cannot express this width well" in capsys.readouterr().out


def test_list_says_what_there_is(run, capsys):
    ema("list", run)
    said = capsys.readouterr().out
    assert "20 snapshots" in said
    assert "at 10 steps from 3 to 30" in said
    assert re.search(r"0\.02 +error 1\.2e-01 +poor", said)


@pytest.mark.parametrize("metric", ["frechet", "val-loss"])
def test_a_sweep_writes_the_best_width(run, tmp_path, capsys, metric):
    out = tmp_path / "best.safetensors"
    options = ["--sigma-rels", "0.05:0.2:3", "--num", 40, "--metric", metric, "--out", out]
    ema("sweep", run, *options)
    said = capsys.readouterr().out
    values = {float(w): float(v) for w, v in re.findall(rf"^([\d.]+) +{metric} ([\d.]+)", said, re.MULTILINE)}
    assert list(values) == pytest.approx([0.05, 0.1, 0.2])
    best = min(values, key=values.__getitem__)
    assert f"best: {best:g}" in said
    (want,) = reconstruct(snapshots_of(run), [best])
    assert_close(load_file(out), want.weights, rtol=0, atol=1e-6)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_ordinary_checkpoints_are_averaged_with_geometric_shares(tmp_path):
    states = [{"w": torch.full((3,), float(i)), "n": torch.tensor(i)} for i in range(3)]
    paths = [tmp_path / f"{i}.ckpt" for i in (2, 0, 1)]
    for i, path in zip((2, 0, 1), paths, strict=True):
        torch.save({"global_step": i, "state_dict": states[i]}, path)
    assert_close(average_checkpoints(paths), {"w": torch.full((3,), 1.0)})
    share = torch.tensor([0.25, 0.5, 1.0]) / 1.75
    assert_close(average_checkpoints(paths, 0.5)["w"], (share @ torch.arange(3.0)).expand(3))
    with pytest.raises(ValueError, match=r"in \(0, 1\]; write 0\.9"):
        average_checkpoints(paths, 1.5)
    torch.save({"global_step": 9, "state_dict": {"v": torch.ones(3)}}, paths[0])
    with pytest.raises(ValueError, match=r"2\.ckpt is of another network than the others: 'v' differs"):
        average_checkpoints(paths)


def test_the_average_of_a_checkpoint_with_itself_is_that(run, tmp_path):
    checkpoint = run / "checkpoints" / "last.ckpt"
    ema("average", checkpoint, checkpoint, "--out", tmp_path / "w.safetensors")
    state = load_checkpoint(checkpoint)["state_dict"]
    averaged = load_file(tmp_path / "w.safetensors")
    assert averaged.keys() <= state.keys()
    assert_close(averaged, {name: state[name] for name in averaged})


MISTAKES = [
    (["recon"], "no `ema recon`; did you mean reconstruct"),
    (
        ["reconstruct", "RUN", "--sigma-rel", "0.3", "--out", "w.safetensors"],
        r"write a number between 0 and 0\.2887",
    ),
    (["reconstruct", "RUN", "--sigma-rel", "x", "--out", "w.safetensors"], "widths 'x': expected S, S,S"),
    (
        ["reconstruct", "RUN", "--sigma-rel", "0.1", "--out", "w.pt"],
        r"expected a name that ends in \.safetensors",
    ),
    (
        ["reconstruct", "RUN", "--sigma-rel", "0.1", "--at-step", "7", "--out", "w.safetensors"],
        "the nearest is 6",
    ),
    (["reconstruct", "RUN", "--sigma-rels", "0.1"], "unknown option --sigma-rels; did you mean --sigma-rel"),
    (["list", "nowhere"], "nowhere holds no snapshots: give the folder that PostHocEMA wrote"),
    (["sweep", "RUN", "--metric", "fid"], "--metric invalid choice: 'fid'"),
    (["sweep", "RUN/snapshots"], "holds no checkpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda x: x if isinstance(x, str) else None)
def test_mistakes_get_one_line_and_leave_nothing(run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status = ema(*(argument.replace("RUN", str(run)) for argument in arguments))
    said = capsys.readouterr().err
    assert status == 2
    assert said.count("\n") == 1
    assert re.search(message, said)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(run, tmp_path, capsys):
    out = tmp_path / "w.safetensors"
    out.write_text("mine")
    assert ema("reconstruct", run, "--sigma-rel", 0.1, "--out", out) == 2
    assert "exists: give another --out, or --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
