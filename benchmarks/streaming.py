"""Streaming with interruptions: how often is each sample of an epoch trained on, in the weights that survive?

python benchmarks/streaming.py [--images 200000] [--kills 5] [--epochs 2] [--folder FOLDER]

Two processes (DDP over gloo), two workers each, train on images in chunks; all of them are killed (SIGKILL) at drawn
steps and started again from the last checkpoint, which is up to `--every` steps old. What was trained on after that
checkpoint is lost with the weights and has to come again; everything else must not. An image's label is its index, so
each process writes down what it has seen, and after how many steps of the weights, which a buffer counts, so that it
goes back with them; counted are the steps that the final weights have been through.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_diffusion.chunks import Prepared, write_chunk, write_index
from lightning_diffusion.datamodules import StreamingDataModule, StreamingOptions
from lightning_diffusion.io import AtomicCheckpointIO

RANKS, WORKERS, PER_CHUNK = 2, 2, 2000


def write(folder: Path, images: int) -> None:
    """Images of 8 x 8 pixels, of one grey each; image i has label i."""
    label = torch.arange(images)
    pixels = (label % 256).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    chunks = -(-images // PER_CHUNK)
    for number in range(chunks):
        rows = slice(number * PER_CHUNK, (number + 1) * PER_CHUNK)
        write_chunk(folder / "training", number, {"image": pixels[rows], "label": label[rows]})
    write_index(folder / "training", chunks, {"image": pixels[:1], "label": label[:1]})
    Prepared("pixels", (1, 8, 8), ("an index",), training=images).write(folder)


class Recording(L.LightningModule):
    """Writes down (steps taken before, epoch, labels) of every step of this process."""

    steps: torch.Tensor

    def __init__(self, records: Path) -> None:
        super().__init__()
        self.weight, self.records = torch.nn.Parameter(torch.zeros(())), records
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        grey = ((batch["image"].amin((1, 2, 3)) + 1) * 127.5).round().long()
        assert torch.equal(grey, batch["label"] % 256), "an image came with the label of another"
        row = np.array([int(self.steps), self.current_epoch, *batch["label"].tolist()])
        self.steps += 1
        with open(f"{self.records}-{self.global_rank}.bin", "ab") as file:
            file.write(row.tobytes())
        return self.weight * batch["image"].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(given: argparse.Namespace) -> None:
    """One attempt, from the last checkpoint if there is one."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(given.folder)
    options = StreamingOptions(streams=16, window=1000)
    data = StreamingDataModule(str(folder / "chunks"), given.batch, num_workers=WORKERS, options=options)
    saving = ModelCheckpoint(
        folder / "checkpoints", save_last=True, every_n_train_steps=given.every, save_top_k=0
    )
    last = folder / "checkpoints" / "last.ckpt"
    trainer = L.Trainer(
        accelerator="cpu", devices=RANKS, strategy="ddp_fork", max_epochs=given.epochs, callbacks=[saving],
        plugins=[AtomicCheckpointIO()], logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Recording(folder / f"seen-{given.attempt}")
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)


def attempt(number: int, given: argparse.Namespace, stop: int | None) -> None:
    """Run one attempt in processes of their own; kill all of them after about `stop` steps."""
    line = [sys.executable, __file__, "--attempt", str(number)]
    for name in ("images", "epochs", "batch", "every", "folder"):
        line += [f"--{name}", str(getattr(given, name))]
    process = subprocess.Popen(line, start_new_session=True, stderr=subprocess.DEVNULL)
    seen = Path(given.folder) / f"seen-{number}-0.bin"
    while stop is not None and process.poll() is None and rows(seen, given.batch) < stop:
        time.sleep(0.01)
    if stop is not None:
        os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    if stop is None and status:
        raise RuntimeError(f"attempt {number} ended with status {status}")


def rows(file: Path, batch: int) -> int:
    """How many steps a record holds."""
    return file.stat().st_size // (8 * (batch + 2)) if file.exists() else 0


def surviving(folder: Path, attempts: int, batch: int) -> tuple[np.ndarray, int]:
    """(step, epoch, labels) of the steps that the last weights have been through, and how many were lost."""
    kept: dict[tuple[int, int], np.ndarray] = {}
    lost = 0
    for number in range(attempts):
        for rank in range(RANKS):
            file = folder / f"seen-{number}-{rank}.bin"
            steps = rows(file, batch)
            found = np.fromfile(file, np.int64, steps * (batch + 2)).reshape(steps, -1) if steps else []
            for row in found:
                lost += (rank, row[0]) in kept
                kept[rank, row[0]] = row
    return np.stack(list(kept.values())), lost


def report(given: argparse.Namespace) -> None:
    steps, lost = surviving(Path(given.folder), given.kills + 1, given.batch)
    print(
        f"{given.images:,} images, {RANKS} processes x {WORKERS} workers, {given.kills} kills of all processes"
    )
    for epoch in range(given.epochs):
        labels = steps[steps[:, 1] == epoch, 2:].flatten()
        times = np.bincount(np.bincount(labels, minlength=given.images))
        said = ", ".join(f"{count:,} images {number} times" for number, count in enumerate(times) if count)
        print(f"epoch {epoch}: {said}")
    print(f"{lost // RANKS} steps were taken again, from checkpoints up to {given.every} steps old")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"images": 200_000, "kills": 5, "epochs": 2, "batch": 100, "every": 50}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", help="to work in; a temporary one by default")
    parser.add_argument("--attempt", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.attempt is not None:
        train(given)
        return
    with tempfile.TemporaryDirectory() as temporary:
        given.folder = given.folder or temporary
        write(Path(given.folder) / "chunks", given.images)
        steps = given.epochs * given.images // (RANKS * given.batch)
        draw = random.Random(0)
        for number in range(given.kills):
            attempt(number, given, given.every + draw.randrange(steps // (given.kills + 1)))
        attempt(given.kills, given, None)
        report(given)


if __name__ == "__main__":
    main()
