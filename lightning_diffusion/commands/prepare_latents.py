"""prepare latents: encode the images of a configuration by its autoencoder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from lightning_diffusion.autoencoders import PretrainedAutoencoder
from lightning_diffusion.commands.reading import read_configuration
from lightning_diffusion.datamodules import LatentsDataModule, write_latents
from lightning_diffusion.io import write_atomically
from lightning_diffusion.latent import LatentRepresentation
from lightning_diffusion.latent_shards import AUTOENCODER, Shard
from lightning_diffusion.module import DiffusionModule
from lightning_diffusion.recording import public_path

OVERLAY = "latents.yaml"


def prepare(own: argparse.Namespace, arguments: list[str], own_options: Sequence[str]) -> None:
    """Write the latents and the configuration that trains on them."""
    cli = read_configuration(arguments, own_options)
    autoencoder = autoencoder_of(cli.model, own.device)
    shards = write_latents(cli.datamodule, autoencoder, own.out, own.batch_size, own.overwrite)
    overlay = Path(own.out) / OVERLAY
    data = {"class_path": public_path(LatentsDataModule), "init_args": {"folder": own.out}}
    write_overlay(overlay, cli.config.as_dict(), data)
    print(f"{own.out}: {_described(shards)}")
    print(f"  train  lightning-diffusion fit {_configs(arguments)}--config {overlay}", flush=True)


def autoencoder_of(model: DiffusionModule, device: str | None) -> nn.Module:
    """The autoencoder of a model that is trained on images, on `device`, by default a GPU where there is one."""
    representation = model.representation
    if not isinstance(representation, LatentRepresentation) or representation.encoded:
        raise ValueError(
            f"prepare needs an autoencoder and images: found model.representation {_named(representation)}, expected "
            "LatentRepresentation with encoded: false"
        )
    return representation.autoencoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _named(representation: Any) -> str:
    encoded = getattr(representation, "encoded", False)
    return f"{type(representation).__name__}{' with encoded: true' if encoded else ''}"


def write_overlay(path: Path, config: dict[str, Any], data: dict[str, Any]) -> None:
    """Write what a configuration says of representation and data, for training on the latents in the folder of `path`.

    Args:
        path: of the YAML.
        config: of the training on images.
        data: {class_path, init_args} of the datamodule; gets the batch size of the configuration.
    """
    representation = config["model"]["representation"]
    arguments = representation["init_args"]
    pretrained = public_path(PretrainedAutoencoder)
    if arguments["autoencoder"]["class_path"] != pretrained:
        weights = {"autoencoder": arguments["autoencoder"], "weights": str(path.parent / AUTOENCODER)}
        arguments = {**arguments, "autoencoder": {"class_path": pretrained, "init_args": weights}}
    batch_size = config["data"].get("init_args", {}).get("batch_size", 64)
    overlay = {
        "model": {"representation": {**representation, "init_args": {**arguments, "encoded": True}}},
        "data": {**data, "init_args": {**data["init_args"], "batch_size": batch_size}},
    }
    text = yaml.safe_dump(overlay, sort_keys=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def _described(shards: Sequence[Shard]) -> str:
    sizes = {part: sum(s.size for s in shards if s.part == part) for part in ("training", "held_out")}
    megabytes = sum(shard.path.stat().st_size for shard in shards) / 1e6
    shape = " x ".join(str(number) for number in shards[0].shape)
    return f"{sizes['training']} training and {sizes['held_out']} held-out latents of {shape}, {megabytes:.1f} MB"


def _configs(arguments: list[str]) -> str:
    """The `--config FILE` among the arguments, each with a space behind it."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    files = [value for option, value in pairs if option == "--config"]
    files += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    return "".join(f"--config {file} " for file in files)
