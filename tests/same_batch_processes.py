"""A fresh script that trains on 1, 2, 4 processes with one global batch; `FOLDER/JOB-WORLD-RANK.pt` is what each saw.

python tests/same_batch_processes.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from forked_ranks import run_ranks
from pictures import two_classes
from small_autoencoder import Gaussian
from test_resumed_data import QUIET

import lightning_diffusion as ld
from lightning_diffusion.datamodules import (
    ImageFolderDataModule,
    StreamingDataModule,
    StreamingOptions,
)
from lightning_diffusion.datamodules.chunk_writing import ChunkWriter

GLOBAL_BATCH = 8
WORLDS = {"pixels": (1, 2, 4), "latents": (1, 2)}


class Recorder(L.Callback):
    """What the loss of each micro-batch was of, and the gradient of each step, averaged over processes."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self.gradients: list[torch.Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        objective, draw, loss_at = module.objective, module.objective.draw, module.objective.loss_at

        def with_given_noise(x0: torch.Tensor, key: Any) -> Any:
            level, _ = draw(x0, key)
            shape = (len(x0) * key.world_size, *x0.shape[1:])
            noise = torch.randn(shape, generator=key.generator("given noise"))
            return level, noise[key.rank :: key.world_size]

        def recorded(network: Any, x0: Any, noise: Any, level: Any, condition: Any, *others: Any) -> Any:
            report = loss_at(network, x0, noise, level, condition, *others)
            seen = {"x0": x0, "level": level.log_snr, "label": condition["label"], "loss": report.loss}
            self.batches.append({name: value.detach().clone() for name, value in seen.items()})
            return report

        objective.draw, objective.loss_at = with_given_noise, recorded

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in module.network.parameters()]))


def data_of(job: str, folder: Path, batch_size: int) -> L.LightningDataModule:
    """Mirrored pixels, or latents that are drawn."""
    if job == "pixels":
        return ImageFolderDataModule(folder / "images", 8, batch_size, flip=True, held_out=0.0)
    options = StreamingOptions(streams=4, window=4)
    return StreamingDataModule(str(folder / "chunks"), batch_size, num_workers=0, options=options)


def train(rank: int, world: int, job: str, folder: Path) -> None:
    L.seed_everything(3, verbose=False)
    torch.set_num_threads(1)
    network = ld.UNet((3, 8, 8), channels=8, num_blocks=1, num_classes=2, dropout=0.0)
    coded = ld.LatentRepresentation(Gaussian(), 0.0, 1.0, encoded=True)
    module = ld.DiffusionModule(
        network, representation=ld.Identity() if job == "pixels" else coded, label_dropout=0.3
    )
    recorder = Recorder()
    trainer = L.Trainer(
        **QUIET, devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=2, num_sanity_val_steps=0,
        callbacks=[recorder], accumulate_grad_batches=2, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data_of(job, folder, GLOBAL_BATCH // world))
    names = recorder.batches[0]
    seen = {name: torch.stack([batch[name] for batch in recorder.batches]) for name in names}
    torch.save(seen | {"gradient": torch.stack(recorder.gradients)}, folder / f"{job}-{world}-{rank}.pt")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    images = ImageFolderDataModule(
        two_classes(folder / "images"), 8, held_out=0.0, in_memory=False, num_workers=0
    )
    ChunkWriter(Gaussian(), chunk_bytes=5000).write(images, folder / "chunks")
    for job, worlds in WORLDS.items():
        for world in worlds:
            run_ranks(world, train, job, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
