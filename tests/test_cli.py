"""The commands' help and their answers to mistakes."""

import re
import subprocess
import sys
import textwrap

import pytest
from commands import command, files_in

from lightning_diffusion.callbacks import SampleGrid
from lightning_diffusion.cli import main
from lightning_diffusion.commands import COMMANDS
from lightning_diffusion.commands.help import PAGES

HELPS = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_needs_no_torch(arguments):
    script = f"""
    import sys
    from lightning_diffusion.cli import main
    try:
        main({arguments})
    finally:
        print('MODULES', *sys.modules)
    """
    heavy = {
        "torch",
        "lightning",
        "torchvision",
        "sklearn",
        "matplotlib",
        "wandb",
        "diffusers",
        "numpy",
        "rich",
    }
    line = [sys.executable, "-c", textwrap.dedent(script)]
    said = subprocess.run(line, capture_output=True, text=True, check=False).stdout
    assert "lightning-diffusion" in said
    assert not heavy & set(said.partition("MODULES")[2].split())


@pytest.mark.parametrize("arguments", [["fit", "--help-all"], ["predict", "--help-all"]], ids=" ".join)
def test_all_options_of_the_page_are_real(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    everything = capsys.readouterr().out
    options = set(re.findall(r"--[a-zA-Z_.]+", PAGES[arguments[0]])) - {"--help-all", "--KEY"}
    nested = {option for option in options if option.count(".") > 1 or option.startswith("--data.")}
    assert {option for option in options - nested if option.rstrip("+") not in everything} == set()
    assert PAGES[arguments[0]].count("\n") < 70


MISTAKES = [
    (["fti"], "there is no command 'fti'; did you mean fit"),
    (["fit", "--config", "absent.yaml"], r"--config \S*absent.yaml does not exist"),
    (["fit", "--resume", "absent"], "absent does not exist: give a checkpoint, or the run folder"),
    (["fit"], "--model.network, --data is needed: give it, or --config FILE"),
    (
        ["fit", "--config", "tiny.yaml", "--trainer.max_epoch", "7"],
        "--trainer.max_epoch; did you mean --trainer.max_epochs",
    ),
    (
        ["fit", "--config", "tiny.yaml", "--trainer.max_step=7"],
        "--trainer.max_step; did you mean --trainer.max_steps",
    ),
    (
        ["fit", "--config", "tiny.yaml", "--model.objectve", "EDM"],
        "--model.objectve; did you mean --model.objective",
    ),
    (
        ["fit", "--config", "tiny.yaml", "--model.objective", "EDMM"],
        "there is no class EDMM; did you mean EDM",
    ),
    (
        ["fit", "--config", "tiny.yaml", "--model.network", "UNett"],
        "there is no class UNett; did you mean UNet",
    ),
    (
        ["fit", "--config", "tiny.yaml", "--model.network.chanels", "7"],
        "UNet has no argument chanels; did you mean channels",
    ),
    (
        ["fit", "--config", "tiny.yaml", "--data.batchsize", "7"],
        "DigitsDataModule has no argument batchsize; did you mean batch_size",
    ),
    (
        ["fit", "--config", "tiny.yaml", "--data", "DigitDataModule"],
        "no class DigitDataModule; did you mean DigitsDataModule",
    ),
    (["fit", "--config", "tiny.yaml", "--data.image_size", "9"], "found image_size=9, expected 8, 16 or 32"),
    (
        ["fit", "--config", "tiny.yaml", "--trainer.max_steps", "many"],
        "trainer.max_steps: expected int, found 'many'",
    ),
    (
        ["fit", "--config", "tiny.yaml", "--model.objective.density.mean", "x"],
        "model.objective.density.mean: expected float, found 'x'",
    ),
    (
        ["fit", "--config", "tiny.yaml", "--model.network", "UNet", "--model.network.image_shape", "3"],
        "model.network.*[Ee]xpected",
    ),
    (["fit", "--config", "misspelt.yaml"], "--trainer.max_step; did you mean --trainer.max_steps"),
    (["fit", "--config", "broken.yaml"], "[Pp]roblems? parsing config"),
    (["validate", "--config", "tiny.yaml"], "validate needs --checkpoint"),
    (["sample", "--out", "a.png"], "--checkpoint is needed"),
    (["sample", "--checkpoint", "absent", "--out", "a.png"], "--checkpoint absent does not exist"),
    (["sample", "--chekpoint", "x", "--out", "a.png"], "--chekpoint; did you mean --checkpoint"),
    (["sample", "--check", "x", "--out", "a.png"], "unknown option --check"),
    (
        ["sample", "--checkpoint", ".", "--out", "a.gif"],
        r"a\.gif: expected a name that ends in \.png or \.npz",
    ),
    (["sample", "--checkpoint", ".", "--out", "a.png"], "holds no checkpoint"),
    (["sample", "--checkpoint", ".", "--out", "tiny.yaml/"], "tiny.yaml"),
    (["sample", "--checkpoint", ".", "--out", "a.png", "--num", "few"], "--num.*'few'"),
    (["sample", "--checkpoint", ".", "--out", "a.png", "--num", "0"], "--num is 0, expected 1 or more"),
    (
        ["sample", "--checkpoint", ".", "--out", "a.png", "--label", "three"],
        "expected class numbers such as 3 or 3,5, found 'three'",
    ),
    (
        ["sample", "--checkpoint", ".", "--out", "a.png", "--steps", "3", "--sampler", "heun:4"],
        "both say how many",
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_gets_one_line_and_leaves_nothing(folder, capsys, arguments, expected):
    (folder / "misspelt.yaml").write_text("trainer: {max_step: 3}\n")
    (folder / "broken.yaml").write_text("trainer: [unclosed\n")
    before = files_in(folder)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert re.search(expected, said[0])
    assert files_in(folder) == before


def test_data_that_are_refused_leave_no_run_folder(folder, capsys):
    arguments = ["fit", "--config", "tiny.yaml", "--model.network.num_classes", "0"]
    assert main(arguments) == 2
    assert "num_classes" in capsys.readouterr().err
    assert not list((folder / "runs").iterdir())


@pytest.mark.parametrize("error", [ZeroDivisionError("a defect"), ValueError("not checked by us")], ids=repr)
def test_defects_keep_their_traceback(folder, monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(SampleGrid, "on_train_start", broken)
    with pytest.raises(type(error), match=str(error)):
        main(["fit", "--config", "tiny.yaml"])


def test_a_command_in_a_process_of_its_own(folder):
    ended = command("sample", "--checkpoint", "absent", "--out", "a.png", cwd=folder)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
