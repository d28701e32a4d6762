"""What tests of the commands share: a folder to work in, one finished run, and the built package."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  (sets the levels of its loggers)
import pytest
from commands import write_config

from lightning_diffusion.cli import main

KEPT = (
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "LIGHTNING_DIFFUSION_RUN_FOLDER",
    "JSONARGPARSE_DEPRECATION_WARNINGS",
)

QUIETENED = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
LEVELS = {name: logging.getLogger(name).level for name in QUIETENED}
VARIABLES = {name: os.environ.get(name) for name in KEPT}


@pytest.fixture(autouse=True)
def process_as_it_began():
    """Fixtures of modules and of the session run commands, which set the seed and quieten loggers, before a test."""
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for name, value in VARIABLES.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="module", autouse=True)
def no_service_of_wandb():
    """One that another module's tests started works in the folder, and with the settings, of that time."""
    if (wandb := sys.modules.get("wandb")) is not None:
        wandb.teardown()


@pytest.fixture
def process_as_it_was(monkeypatch):
    """Commands set the seed, quieten loggers and name the run in the environment."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    levels = [logger.level for logger in loggers]
    monkeypatch.setattr(sys, "argv", ["lightning-diffusion"])
    before = {name: os.environ.get(name) for name in KEPT}
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def folder(tmp_path, monkeypatch, process_as_it_was):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with one finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder)
    here, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["lightning-diffusion"]
    try:
        assert main(["fit", "--config", "tiny.yaml"]) == 0
    finally:
        os.chdir(here)
        sys.argv = argv
    return folder / "runs" / "tiny-1"


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """The sdist of the checkout, and the wheel made from that sdist."""
    where = tmp_path_factory.mktemp("built")
    kept_out = (".git", "*.egg-info", "runs", ".*_cache", "__pycache__", ".venv", "build", "dist")
    root = Path(__file__).resolve().parents[1]
    shutil.copytree(root, where / "source", symlinks=True, ignore=shutil.ignore_patterns(*kept_out))
    line = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(where / "dist")]
    subprocess.run(line, cwd=where / "source", check=True, capture_output=True)
    (sdist,), (wheel,) = (where / "dist").glob("*.tar.gz"), (where / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def installed(distributions, tmp_path_factory):
    """Environment variables under which only the installed wheel is seen."""
    target = tmp_path_factory.mktemp("installed")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--target",
        str(target),
    ]
    subprocess.run([*pip, str(distributions[1])], check=True)
    return {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
