"""`lightning-diffusion evaluate`: one row per combination, on the screen and on the disk, and a picture."""

import csv
import json
import re
import shutil

import pytest
import torch
from PIL import Image
from test_features import no_network
from torch_fidelity import feature_extractor_inceptionv3 as inception

from lightning_diffusion.cli import main

QUICK = [
    "--extractor",
    "ClassifierFeatures",
    "--extractor.steps",
    "2",
    "--extractor.num_features",
    "8",
    "--num",
    "20",
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def evaluate(checkpoint, *arguments):
    return main(["evaluate", "--checkpoint", str(checkpoint), *QUICK, *arguments])


def rows(folder):
    with open(folder / "evaluation.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "out"
    wanted = ["--weights", "ema,online", "--samplers", "heun:2,dpm:3", "--guidance", "1,2"]
    assert evaluate(trained, *wanted, "--out", str(out)) == 0
    return out


def test_every_combination_is_a_row_with_the_calls_that_it_took(evaluated):
    """Heun takes two calls per step but the last, guidance doubles them."""
    table = rows(evaluated)
    found = {(r["weights"], r["sampler"], r["guidance"]): int(r["evaluations"]) for r in table}
    assert len(table) == len(found) == 8
    for weights in ("ema", "online"):
        assert found[weights, "heun", "1.0"] == 3
        assert found[weights, "dpmsolver2m", "1.0"] == 3
        assert found[weights, "heun", "2.0"] == found[weights, "dpmsolver2m", "2.0"] == 6
    assert len({row["frechet"] for row in table}) == 8
    assert all(0 <= float(row[name]) <= 1 for row in table for name in ("precision", "recall", "near_copies"))


def test_json_says_the_same_and_with_what_it_was_measured(evaluated):
    said = json.loads((evaluated / "evaluation.json").read_text())
    assert said["samples"] == 20
    assert said["extractor"].startswith("ClassifierFeatures(num_features=8, steps=2")
    assert [str(row["frechet"]) for row in said["rows"]] == [row["frechet"] for row in rows(evaluated)]
    with Image.open(evaluated / "evaluation.png") as picture:
        assert picture.size[0] > 800


def test_a_row_says_all_that_makes_its_figure(evaluated, trained, tmp_path):
    """The CSV by itself; with it the same command gives the same figures."""
    guided = ["--guidance", "2", "--guidance-interval", "0.1,10", "--guidance-rescale", "0.5"]
    guided += ["--guide", str(trained), "--guide-weights", "online", "--samplers", "euler:2", "--seed", "3"]
    assert evaluate(trained, *guided, "--out", str(tmp_path / "out")) == 0
    (row,), plain = rows(tmp_path / "out"), rows(evaluated)[0]
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    said = {"checkpoint": checkpoint, "checkpoint_step": "6", "samples": "20", "data": "DigitsDataModule"}
    said |= {"training_images": "1531", "held_out_images": "266", "extractor": plain["extractor"]}
    assert row.items() >= (said | {"seed": "3", "weights": "ema", "sampler": "euler", "steps": "2"}).items()
    assert plain.items() >= (said | {"seed": "0", "weights": "ema", "sampler": "heun", "steps": "2"}).items()
    asked = {"guidance": "2.0", "guidance_interval": "0.1,10", "guidance_rescale": "0.5", "guide": checkpoint}
    assert row.items() >= (asked | {"guide_weights": "online"}).items()
    assert {plain[name] for name in asked} == {"1.0", ""}
    assert row["data_hash"] == plain["data_hash"]
    assert "Euler(num_steps=2" in row["sampler_settings"]
    assert f"torch {torch.__version__}" in row["versions"]
    whole = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (inside,) = whole.pop("rows")
    assert {k: "" if v is None else str(v) for k, v in (whole | inside).items()} == row


def test_the_same_again_beside_the_run_and_nothing_overwritten(
    evaluated, trained, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(trained, tmp_path / "run")
    assert evaluate(run, "--samplers", "dpmsolver2m:3") == 0
    said = capsys.readouterr().out
    assert "20 samples each, seed 0, against 1531 training images of DigitsDataModule; 266 held out" in said
    again, before = rows(run / "evaluation")[0], rows(evaluated)
    match = next(
        r for r in before if (r["weights"], r["sampler"], r["guidance"]) == ("ema", "dpmsolver2m", "1.0")
    )
    differ = {name for name in again if again[name] != match[name]}
    assert differ <= {"seconds", "checkpoint"}
    assert evaluate(run) == 2
    assert "evaluation exists: give another --out, or --overwrite" in capsys.readouterr().err


MISTAKES = [
    (["--samplers", "huen:3"], "there is no sampler huen; did you mean heun"),
    (["--samplers", "heun:"], "sampler heun:: expected NAME:STEPS such as heun:18"),
    (["--weights", "ema:slow"], "There is no average 'slow'"),
    (["--weights", "ema,,online"], "expected names with commas between them"),
    (["--guidance", "1,x"], r"expected scales such as 1,1\.5,2, found '1,x'"),
    (["--num", "5"], "--num is 5, expected 10 or more"),
    (["--guidence", "2"], "unknown option --guidence; did you mean --guidance"),
    (["--data.image_size", "16"], r"drawn images of shape \(1, 8, 8\) and real ones of \(1, 16, 16\)"),
    (
        ["--data", "ImageFolderDataModule", "--data.folder", "EMPTY", "--data.image_size", "8"],
        "found no image in 'EMPTY'",
    ),
    (["--data.labels", "false"], "ClassifierFeatures learn from labels, and the data have none"),
    (["--config", "absent.yaml"], "--config absent.yaml does not exist"),
    (["--extractor", "Inception"], "there is no class Inception"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes_get_one_line_and_leave_nothing(trained, folder, capsys, arguments, message):
    (folder / "EMPTY").mkdir()
    assert evaluate(trained, "--out", "out", *arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)
    assert not (folder / "out").exists()


def test_no_network_for_inception_is_one_line(trained, folder, capsys, monkeypatch):
    monkeypatch.setattr(inception, "load_state_dict_from_url", no_network)
    line = [
        "evaluate",
        "--checkpoint",
        str(trained),
        "--num",
        "20",
        "--extractor",
        "InceptionFeatures",
        "--out",
        "out",
    ]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(r"Inception weights cannot be had.*ClassifierFeatures.*weights_path", said)


def test_a_diverged_checkpoint_is_named(trained, folder, capsys):
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.startswith("network."))
    checkpoint["state_dict"][name].fill_(float("nan"))
    torch.save(checkpoint, folder / "broken.ckpt")
    assert evaluate("broken.ckpt", "--weights", "online", "--data", "DigitsDataModule", "--out", "out") == 2
    assert re.search(
        rf"broken\.ckpt has diverged: 1 of \d+ tensors of its online weights hold NaN.*{name}",
        capsys.readouterr().err,
    )
    assert evaluate("broken.ckpt", "--weights", "ema", "--out", "out") == 2
    assert "its data are not known: give --data CLASS" in capsys.readouterr().err


def test_fewer_samples_than_features_are_warned_of(trained, folder, capsys):
    assert evaluate(trained, "--extractor.num_features", "32", "--samplers", "euler:1", "--out", "out") == 0
    assert "warning: found 20 samples for 32 features" in capsys.readouterr().out
