"""Run as a script: a training with PostHocEMA that is killed ten times and resumed, and one that is not.

Children are forked, so that everything is imported once. A child dies by SIGKILL between two steps, or half-way
through writing a snapshot, just before it appears, or half-way through writing a checkpoint.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from foreign import QUIET
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_diffusion as ld
from lightning_diffusion import io, snapshots
from lightning_diffusion.callbacks import PostHocEMA
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.reconstruction import reconstruct

STEPS, KILLS = 48, 10
PLACES = ["step", "snapshot", "publish", "checkpoint"]


class Killer(L.Callback):
    """Kills this process at the `count`-th event of a kind."""

    def __init__(self, place: str, count: int) -> None:
        self.place, self.left = place, count

    def event(self, place: str, half: Callable[[], object] = lambda: None) -> None:
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                half()
                os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, *_: Any) -> None:
        self.event("step")

    def watch(self) -> None:
        """Stand in the way of what writes."""
        save_file, publish, save = snapshots.save_file, snapshots.publish, torch.save

        def save_snapshot(tensors: Any, path: Path, header: Any) -> None:
            self.event("snapshot", lambda: Path(path).write_bytes(b"half"))
            save_file(tensors, path, header)

        def publish_snapshot(temporary: Path, path: Path) -> None:
            self.event("publish")
            publish(temporary, path)

        def save_checkpoint(checkpoint: Any, file: Any) -> None:
            self.event("checkpoint", lambda: file.write(b"half"))
            save(checkpoint, file)

        snapshots.save_file, snapshots.publish, torch.save = save_snapshot, publish_snapshot, save_checkpoint


def train(folder: Path, killer: Killer) -> None:
    """Go on from the newest checkpoint, or from the start."""
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    if not checkpoints:
        shutil.rmtree(folder / "snapshots", ignore_errors=True)
    killer.watch()
    torch.manual_seed(0)
    network = ld.UNet(
        [1, 8, 8], channels=8, multipliers=[1], num_blocks=1, attention_levels=[], num_classes=10
    )
    module = ld.DiffusionModule(network)
    averages = PostHocEMA(every_n_steps=2, directory=folder / "snapshots", storage="difference")
    saving = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=5, save_top_k=-1)
    options = QUIET | {"max_steps": STEPS, "limit_val_batches": 0, "plugins": [io.AtomicCheckpointIO()]}
    trainer = L.Trainer(callbacks=[averages, saving, killer], **options)
    trainer.fit(module, DigitsDataModule(batch_size=8), ckpt_path=checkpoints[-1] if checkpoints else None)
    torch.save(averages.state_dict()["averages"], folder / "averages.pt")


def forked(folder: Path, killer: Killer) -> int:
    """The signal that ended the child, or 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(folder, killer)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def results(folder: Path) -> dict[str, torch.Tensor]:
    """All averages, kept and rebuilt."""
    found = {f"{n}/{k}": x for n, w in torch.load(folder / "averages.pt").items() for k, x in w.items()}
    for rebuilt in reconstruct(snapshots.list_snapshots(folder / "snapshots"), [0.03, 0.07, 0.2]):
        found |= {f"{rebuilt.sigma_rel}/{k}": x for k, x in rebuilt.weights.items()}
    return found


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    assert forked(folder / "straight", Killer("none", 0)) == 0
    kills = 0
    while kills < KILLS or not (folder / "killed" / "averages.pt").is_file():
        kind = PLACES[kills % len(PLACES)] if kills < KILLS else "none"
        died = forked(folder / "killed", Killer(kind, draw.randint(1, 6)))
        kills += died == signal.SIGKILL
        print(f"{kind}: {'killed' if died else 'finished'}", flush=True)
        if not died and kills < KILLS:
            shutil.rmtree(folder / "killed")
    straight, killed = results(folder / "straight"), results(folder / "killed")
    assert straight.keys() == killed.keys()
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
    print(f"{kills} kills, {len(straight)} tensors bit-equal")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
