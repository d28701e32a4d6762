"""Autoencoders for the digits: exact, convolutional, random; what a fresh process draws."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import torch
from torch import nn

import lightning_diffusion as ld
from lightning_diffusion.datamodules import DigitsDataModule


def images(count=256):
    return DigitsDataModule().training_data().images[:count]


def rotation(channels=4):
    """Principal components of 2 x 2 patches; with four of them nothing is lost."""
    made = ld.PatchPCA(channels)
    made.measure([images()])
    return made


class Convolutional(nn.Module):
    """1 x 8 x 8 to 2 x 4 x 4, with batch norm and dropout, which eval mode turns off."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout(0.2)
        )
        self.bottom, self.up = nn.Conv2d(8, 2, 2, stride=2), nn.ConvTranspose2d(2, 8, 2, stride=2)
        self.out = nn.Sequential(nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))

    def encode(self, x):
        return self.bottom(self.down(x))

    def decode(self, z):
        return self.out(self.up(z))


def trained_convolutional(steps=60):
    torch.manual_seed(0)
    made, data = Convolutional(), images()
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (made.decode(made.encode(data)) - data).square().mean().backward()
        optimizer.step()
    return made


class Gaussian(nn.Module):
    """Encodes to N(2 x + 1, 0.3^2); its outputs are wrapped as those of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def encode(self, x):
        mean = self.factor * x + 1
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.3)))

    def decode(self, z):
        return SimpleNamespace(sample=(z - 1) / self.factor)


DRAW = """
import sys, torch, lightning_diffusion as ld
load = ld.DiffusionModule.load_from_checkpoint
*checkpoints, out = sys.argv[1:]
torch.save([load(path, weights_only=True).sample(3, seed=4) for path in checkpoints], out)
"""


def drawn_elsewhere(checkpoints, folder):
    """Samples of seed 4 in a process of its own that is given nothing but the checkpoints."""
    out = folder / "drawn.pt"
    line = [sys.executable, "-c", DRAW, *map(str, checkpoints), str(out)]
    subprocess.run(line, cwd=folder, check=True, capture_output=True, text=True)
    return torch.load(out)
