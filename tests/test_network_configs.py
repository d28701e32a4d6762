"""The digits job with each network, from the command line: it trains, is loaded and draws."""

import csv
import math
from pathlib import Path

import pytest
import torch

import lightning_diffusion as ld
from lightning_diffusion.cli import main

ROOT = Path(__file__).parent.parent
QUICK = [
    "--data.batch_size=32",
    "--trainer.max_steps=4",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.limit_train_batches=4",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.callbacks=[PowerFunctionEMA]",
]


@pytest.mark.parametrize(
    ("name", "network"), [("dit", ld.DiT), ("magnitude_preserving", ld.MagnitudePreservingUNet)]
)
def test_the_digits_job_with_each_network(name, network, folder):
    config = ROOT / "configs" / "networks" / f"{name}.yaml"
    first = config.read_text().splitlines()[0]
    assert (
        first
        == f"# lightning-diffusion fit --config configs/digits.yaml --config configs/networks/{name}.yaml"
    )
    files = ["--config", str(ROOT / "configs" / "digits.yaml"), "--config", str(config)]
    assert main(["fit", *files, *QUICK, "--name", name]) == 0
    run = Path("runs", f"{name}-1")
    loaded = ld.DiffusionModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert type(loaded.network) is network
    with (run / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert losses
    assert all(map(math.isfinite, losses))
    drawn = loaded.sample(3, {"label": torch.arange(3)}, sampler=ld.Euler(2), guidance=ld.ClassifierFree(2.0))
    assert drawn.isfinite().all()


def test_a_network_is_chosen_by_its_short_name(folder):
    choice = [
        "--model.network",
        "DiT",
        "--model.network.image_shape",
        "[1, 8, 8]",
        "--model.network.num_classes",
        "10",
    ]
    size = [
        "--model.network.size.width",
        "16",
        "--model.network.size.num_heads",
        "2",
        "--model.network.size.depth",
        "1",
    ]
    options = ["--model.network.options.rotary", "false", "--trainer.max_steps", "1"]
    assert main(["fit", "--config", "tiny.yaml", *choice, *size, *options]) == 0
    (checkpoint,) = Path("runs").rglob("last.ckpt")
    network = ld.DiffusionModule.load_from_checkpoint(checkpoint).network
    assert network.options == ld.DiTOptions(rotary=False)
    assert len(network.blocks) == 1
