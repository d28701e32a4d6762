"""What tests of the commands share: a folder to work in and one finished run."""

import logging
import os
import sys

import pytest
from commands import write_config

from lightning_diffusion.cli import main

KEPT = (
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "LIGHTNING_DIFFUSION_RUN_FOLDER",
    "JSONARGPARSE_DEPRECATION_WARNINGS",
)


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
