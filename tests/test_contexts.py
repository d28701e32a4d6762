"""A network with cross-attention: pictures show held-out contexts, all else refuses to draw without one."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image
from small_module import fit
from torch import nn
from torch.utils.data import DataLoader

import lightning_diffusion as ld
from lightning_diffusion.callbacks import SampleGrid
from lightning_diffusion.cli import main
from lightning_diffusion.commands.ema_sweep import _evaluation
from lightning_diffusion.contexts import first_conditions, takes_context
from lightning_diffusion.exported import export_safetensors
from lightning_diffusion.plots import image_grid


def attending(num_classes=0):
    """Its attention is woken, so that the context shows."""
    torch.manual_seed(0)
    network = ld.UNet((1, 8, 8), 8, (1,), 1, attention_levels=(0,), context_dim=4, num_classes=num_classes)
    for p in network.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return ld.DiffusionModule(network, representation=ld.Standardize([0.0], [0.5]), sampler=ld.Euler(2))


def batches(number=12, size=4, tokens=3, **others):
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"image": torch.zeros(1, 8, 8), "context": torch.randn(tokens, 4, generator=generator), **others}
        for _ in range(number)
    ]
    return DataLoader(rows, batch_size=size)


def trained(model, tmp_path, validation, **options):
    model.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    options = {"default_root_dir": tmp_path, "limit_val_batches": 1, "num_sanity_val_steps": 0, **options}
    return fit(model, Both(batches(), validation), 1, **options)


class Both(ld.datamodules.DigitsDataModule):
    """Training and validation loaders as given."""

    def __init__(self, training, validation):
        super().__init__()
        self.loaders = training, validation

    def train_dataloader(self):
        return self.loaders[0]

    def val_dataloader(self):
        return self.loaders[1] or []


@pytest.mark.parametrize("num_classes", [0, 5])
def test_a_picture_shows_a_row_for_each_held_out_context_with_its_label(tmp_path, num_classes):
    label = {"label": torch.tensor(3)} if num_classes else {}
    model, validation = attending(num_classes), batches(7, 3, **label)
    trained(model, tmp_path, validation, callbacks=[SampleGrid(rows=5, columns=2, scale=1)])
    rows = torch.cat([batch["context"] for batch in validation])[:5].repeat_interleave(2, 0)
    condition = {"context": rows} | ({"label": torch.full((10,), 3)} if num_classes else {})
    expected = image_grid(model.sample(10, condition), columns=2, scale=1)
    shown = np.asarray(Image.open(tmp_path / "samples" / "step=000001.png"))
    assert (shown == np.asarray(expected)).all()
    without = image_grid(model.sample(10, {k: v for k, v in condition.items() if k != "context"}), 2, 1)
    assert not (shown == np.asarray(without)).all()


@pytest.mark.parametrize("validation", [None, DataLoader(torch.zeros(4, 1, 8, 8))])
def test_a_picture_without_held_out_contexts_is_refused_before_the_first_step(tmp_path, validation):
    said = "SampleGrid draws without context, but UNet attends to one.*validation data whose batches have one"
    with pytest.raises(ValueError, match=said):
        trained(attending(), tmp_path, validation, callbacks=[SampleGrid()])


def test_contexts_of_another_length_are_left_out():
    loaders = [batches(4, 4), batches(4, 4, tokens=5)]
    assert first_conditions(loaders, attending(), 6)["context"].shape == (4, 3, 4)
    assert first_conditions([], attending(), 6) == {}


COMMANDS = {
    "sample": ["--out", "a.png"],
    "evaluate": ["--num", "20", "--data", "DigitsDataModule", "--out", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_to_draw_without(folder, capsys, command):
    export_safetensors(attending(), folder / "m.safetensors")
    assert main([command, "--checkpoint", "m.safetensors", *COMMANDS[command]]) == 2
    said = capsys.readouterr().err
    assert f"{command} draws without context, but UNet attends to one" in said
    assert said.count("\n") == 1
    assert not [*folder.glob("a.png"), *folder.glob("out")]


def test_a_sweep_refuses_by_frechet_distance():
    given = argparse.Namespace(metric="frechet", num=10, seed=0)
    with pytest.raises(ValueError, match=r"ema sweep draws without context.*--metric val-loss"):
        _evaluation(given, attending(), ld.datamodules.DigitsDataModule())


def test_a_foreign_network_attends_if_it_has_the_keyword():
    class Foreign(nn.Module):
        def forward(self, x, c_noise, context=None):
            return x

    class Plain(nn.Module):
        def forward(self, x, c_noise):
            return x

    holding = lambda network: type("Module", (), {"network": network})  # noqa: E731
    assert takes_context(holding(Foreign()))
    assert not takes_context(holding(Plain()))
    assert not takes_context(holding(ld.UNet((1, 8, 8), 8, (1,), 1)))
    assert not takes_context(nn.Identity())
