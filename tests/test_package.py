"""The package is whole, light to import, and its parts know only what lies below them.

`python tests/test_package.py` writes lightning_diffusion/__init__.pyi, the public names as type checkers see them.
"""

import ast
import graphlib
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lightning_diffusion as ld
from lightning_diffusion.cli import main

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_diffusion"
STUB = PACKAGE / "__init__.pyi"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FOLDERS = [PACKAGE, ROOT / "callbacks", ROOT / "datamodules", ROOT / "tests", ROOT / "benchmarks"]
FILES = sorted(
    file for folder in FOLDERS for file in folder.rglob("*.py") if not (folder / file).is_symlink()
)


def module_of(file):
    parts = ("lightning_diffusion", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


@cache
def modules(in_functions=True):
    """Module name -> everything it imports, submodules of this package by their full names."""
    folders = [PACKAGE, PACKAGE / "callbacks", PACKAGE / "datamodules"]
    files = {module_of(file): file for folder in folders for file in folder.rglob("*.py")}
    return {name: set(imported(file, set(files), in_functions)) for name, file in files.items()}


def imported(file, known, in_functions):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if in_functions else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            deeper = {f"{node.module}.{alias.name}" for alias in node.names} & known
            yield from deeper or {node.module}


def within(names, *prefixes):
    return {name for name in names if any(name == p or name.startswith(f"{p}.") for p in prefixes)}


def run(*line, **options):
    return subprocess.run(
        [str(part) for part in line], capture_output=True, text=True, check=False, **options
    )


def test_packages_are_the_folders():
    folders = {module_of(file) for file in modules_files("__init__.py")}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


def modules_files(name):
    folders = [PACKAGE, PACKAGE / "callbacks", PACKAGE / "datamodules"]
    return {file for folder in folders for file in folder.rglob(name)}


def test_the_version_is_said_once():
    assert PROJECT["project"]["version"] == ld.__version__


def test_importing_the_package_imports_nothing_heavy():
    said = run(sys.executable, "-c", "import sys, lightning_diffusion; print(*sys.modules)").stdout.split()
    heavy = {"torch", "wandb", "torchvision", "sklearn", "matplotlib", "diffusers", "lightning", "numpy"}
    assert "lightning_diffusion" in said
    assert not heavy & set(said)


def test_public_names_are_sorted_and_there():
    assert ld.__all__ == sorted(ld.__all__) == dir(ld)
    assert all(getattr(ld, name) is not None for name in ld.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'EDN'"):
        ld.EDN  # noqa: B018


def stub():
    names = sorted(ld._MODULE_OF.items(), key=lambda item: (item[1], item[0]))
    lines = [f"from lightning_diffusion.{module} import {name} as {name}" for name, module in names]
    values = ["", "__all__: list[str]", "__version__: str", ""]
    return "\n".join(["# written by `python tests/test_package.py`", *lines, *values])


def test_type_checkers_see_the_public_names():
    assert set(STUB.read_text().split("\n")) == set(stub().split("\n")), (
        "public names have changed: run `python tests/test_package.py`"
    )


def test_imports_go_downwards():
    everywhere = modules(False)
    inside = {name: within(found, "lightning_diffusion") - {name} for name, found in everywhere.items()}
    list(graphlib.TopologicalSorter(inside).static_order())  # raises on a circle


CORE = "noise_level processes schedules densities time_densities weightings targets preconditioning objective presets"
PURE = [
    *CORE.split(),
    "sampling",
    "guidance",
    "averaging",
    "profiles",
    "posthoc",
    "metrics",
    "learning_rates",
    "norms",
    "scaling",
    "gradients",
    "step_gradients",
    "delicate_layers",
    "spikes",
    "step_values",
    "rollback",
]


@pytest.mark.parametrize("name", PURE)
def test_mathematics_knows_no_lightning(name):
    found = modules().get(f"lightning_diffusion.{name}", set())
    assert not within(found, "lightning", "torchmetrics", "matplotlib", "wandb", "PIL", "rich")


def test_the_core_knows_no_callback_logger_or_plot():
    outer = [
        f"lightning_diffusion.{part}" for part in ("callbacks", "datamodules", "commands", "cli", "plots")
    ]
    for name, found in modules().items():
        if not within({name}, *outer, "lightning_diffusion.analysis", "lightning_diffusion.__main__"):
            assert not within(found, *outer, "lightning.pytorch.loggers", "matplotlib", "wandb"), name


def test_callbacks_and_datamodules_know_neither_each_other_nor_commands():
    for name, found in modules().items():
        others = {"callbacks": "datamodules", "datamodules": "callbacks"}
        for mine, other in others.items():
            if within({name}, f"lightning_diffusion.{mine}"):
                assert not within(found, f"lightning_diffusion.{other}", "lightning_diffusion.commands"), name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_long(file):
    assert len(file.read_text().splitlines()) <= 300


@pytest.mark.parametrize("name", ["callbacks", "datamodules"])
def test_the_two_folders_refuse_another_name(name):
    refused = run(sys.executable, "-c", f"import {name}", cwd=ROOT)
    assert f"installed as lightning_diffusion.{name}" in refused.stderr


@pytest.mark.parametrize(
    "config",
    [c for c in CONFIGS if c.parent.name != "strategies"],
    ids=lambda config: str(config.relative_to(ROOT)),
)
def test_every_configuration_runs_with_the_command_that_it_opens_with(
    config, tmp_path, monkeypatch, process_as_it_was
):
    opening = config.read_text().splitlines()[0]
    assert opening.startswith("# lightning-diffusion fit ")
    assert str(config.relative_to(ROOT)) in opening
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number in range(20):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    arguments = [str(tmp_path / "images") if word == "PATH" else word for word in shlex.split(opening)[2:]]
    monkeypatch.chdir(tmp_path)
    if "CHUNKS" in arguments:
        pytest.importorskip("litdata")
        assert main(["prepare", "images", "CHUNKS", "--image-size", "64", "--workers", "0"]) == 0
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    quick = ["--trainer.fast_dev_run", "true", "--data.batch_size", "2", "--trainer.accelerator", "cpu"]
    quick += ["--model.sampler", "Euler", "--model.sampler.num_steps", "1"]
    small = ["--model.network.channels", "32"] if "configs/images.yaml" in arguments else []
    assert main([*arguments, *quick, *small]) == 0


@pytest.mark.slow
def test_sdist_and_wheel_hold_every_module(distributions):
    expected = {str(file.relative_to(ROOT)) for file in modules_files("*.py")}
    expected |= {"lightning_diffusion/py.typed", "lightning_diffusion/__init__.pyi"}
    with zipfile.ZipFile(distributions[1]) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    in_tree = {name.removeprefix("lightning_diffusion/") if is_moved(name) else name for name in expected}
    assert in_tree <= names


def is_moved(name):
    return name.startswith(("lightning_diffusion/callbacks/", "lightning_diffusion/datamodules/"))


@pytest.mark.slow
def test_an_uninstalled_checkout_works_from_its_root(distributions):
    source = distributions[0].parents[1] / "source"
    script = "import lightning_diffusion.callbacks as c, lightning_diffusion as l; print(c.EMA, l.__file__)"
    ended = run(sys.executable, "-c", script, cwd=source)
    assert str(source) in ended.stdout, ended.stderr


if __name__ == "__main__":
    STUB.write_text(stub())
