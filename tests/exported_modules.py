"""Modules to export, and how others draw from the exports: plain diffusers, plain torch."""

import torch
from torch import nn

import lightning_diffusion as ld
from lightning_diffusion.diffusers_models import FREQUENCIES

UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "num_class_embeds": 4,
}
DIT_OPTIONS = ld.DiTOptions(False, False, False, False, True, FREQUENCIES)


def unet():
    return spread(ld.DiffusersUNet(UNET))


def dit(num_classes=3, options=DIT_OPTIONS):
    return spread(ld.DiT((3, 8, 8), 2, ld.DiTSize(16, 2, 2), num_classes, options))


def spread(network):
    """Parameters that nothing is zero of, so that everything counts."""
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1, generator=generator)
    return network.eval()


def module(network, objective=None, **arguments):
    return ld.DiffusionModule(network, objective or ld.EDM(), **arguments).eval()


NOISE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
LABEL = torch.tensor([0, 1, 2, 3])


@torch.no_grad()
def drawn(model, sampler, noise=NOISE, label=LABEL):
    """Before the representation decodes it."""
    return sampler(model.denoiser({"label": label}), noise, model.objective.schedule)


DIFFUSERS = """
import json, sys
import torch, diffusers

@torch.no_grad()
def draw(folder, steps, noise, label):
    kind = json.load(open(f"{folder}/scheduler/scheduler_config.json"))["_class_name"]
    scheduler = getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler")
    try:
        model = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    except OSError:
        model = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    scheduler.set_timesteps(steps)
    x, options = noise * json.load(open(f"{folder}/lightning_diffusion.json"))["noise_scale"], {}
    if kind == "DDIMScheduler":
        options = {"use_clipped_model_output": True}
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t.expand(len(x)), class_labels=label).sample
        x = scheduler.step(output[:, : x.shape[1]], t, x, **options).prev_sample
    return x
"""
"""What a user of diffusers would write."""

TORCH = """
import json
import torch

@torch.no_grad()
def draw(path, noise, label):
    extra = {"lightning_diffusion.json": ""}
    denoiser = torch.export.load(path, extra_files=extra).module()
    levels = json.loads(extra["lightning_diffusion.json"])["levels"]
    pairs = torch.tensor([levels["alpha"], levels["sigma"]]).T
    x = pairs[0][1] * noise
    for (a, s), (b, r) in zip(pairs, pairs[1:]):
        x0 = denoiser(x, a.expand(len(x)), s.expand(len(x)), label)
        x = b * x0 + r * (x - a * x0) / s
    return x
"""
"""Euler's steps, by what an exported program says about itself."""


def function(source):
    """`draw` of a source above."""
    space = {}
    exec(source, space)
    return space["draw"]
