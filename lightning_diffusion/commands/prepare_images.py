"""prepare images: a folder of images, or their latents, in chunks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from lightning_diffusion.chunks import Prepared, litdata
from lightning_diffusion.commands.prepare_latents import OVERLAY, autoencoder_of, write_overlay
from lightning_diffusion.commands.reading import read_configuration
from lightning_diffusion.datamodules import ImageFolderDataModule, StreamingDataModule
from lightning_diffusion.datamodules.chunk_writing import PARTS, ChunkWriter
from lightning_diffusion.recording import public_path

MOST_WORKERS = 8


def prepare(own: argparse.Namespace) -> None:
    """Write the chunks, with --latents also the configuration that trains on them, and say so."""
    litdata()
    cli = read_configuration(_arguments(own)) if own.latents else None
    autoencoder = autoencoder_of(cli.model, own.device) if cli else None
    workers = min(os.cpu_count() or 1, MOST_WORKERS) if own.workers is None else own.workers
    writer = ChunkWriter(autoencoder, own.batch_size, workers, own.chunk_megabytes * 2**20, own.overwrite)
    prepared = writer.write(_data(own), own.out)
    print(f"{own.out}: {_described(prepared, Path(own.out))}")
    data: dict[str, Any] = {"class_path": public_path(StreamingDataModule), "init_args": {"folder": own.out}}
    if cli:
        write_overlay(Path(own.out) / OVERLAY, cli.config.as_dict(), data)
    print(f"  train  lightning-diffusion fit {_line(own)}", flush=True)


def _data(own: argparse.Namespace) -> ImageFolderDataModule:
    return ImageFolderDataModule(
        own.folder,
        own.image_size,
        channels=own.channels,
        held_out=own.held_out,
        skip_broken=own.skip_broken,
        in_memory=False,
        num_workers=0,
    )


def _arguments(own: argparse.Namespace) -> list[str]:
    """As for fit: the configuration is read with these images as its data."""
    data = ["--data", "ImageFolderDataModule", "--data.folder", own.folder]
    data += ["--data.image_size", str(own.image_size), "--data.channels", str(own.channels)]
    return [*_configs(own), *data]


def _configs(own: argparse.Namespace) -> list[str]:
    return [word for file in own.latents for word in ("--config", file)]


def _line(own: argparse.Namespace) -> str:
    if own.latents:
        return " ".join([*_configs(own), "--config", str(Path(own.out) / OVERLAY)])
    return f"--config FILE --data StreamingDataModule --data.folder {own.out}"


def _described(prepared: Prepared, folder: Path) -> str:
    files = [file for part in PARTS for file in (folder / part).glob("*.bin")]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    what = "images" if prepared.kind == "pixels" else "latents"
    shape = " x ".join(str(number) for number in prepared.shape)
    counted = f"{prepared.training} training and {prepared.held_out} held-out {what} of {shape}"
    return f"{counted}, {megabytes:.1f} MB in {len(files)} files"
