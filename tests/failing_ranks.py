"""A fresh script: two ranks train, and something happens to one of them.

    python tests/failing_ranks.py FOLDER

Each job leaves in its folder, for each attempt A and rank R: `errors-A-R.txt`, `seen-A-R.txt` (step and images of each
micro-batch), `ended-A.json` (seconds from the fault until both had ended, statuses), and end.pt, the weights.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from forked_ranks import environment_of, free_port, start
from pictures import save
from test_resumed_data import QUIET

import lightning_diffusion as ld
from lightning_diffusion.callbacks import EMA, LastCheckpoint, RankWatchdog, SaveOnSignal
from lightning_diffusion.datamodules import ImageFolderDataModule

EPOCHS, BATCHES, BATCH_SIZE, FAULT = 2, 8, 4, 10
FAULTS = ("SIGKILL", "SIGSTOP", "exception", "exception of the first", "stall", "broken file")


def numbers(image: torch.Tensor) -> list[int]:
    """Of images as `main` writes them: each has one grey of its own."""
    grey: list[int] = ((image.mean((1, 2, 3)) + 1) * 127.5 / 3).round().long().tolist()
    return grey


class Diary(L.Callback):
    """Which images each step was on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, _: int) -> None:
        with open(f"{self.path}-{trainer.global_rank}.txt", "a") as file:
            print(trainer.global_step, *numbers(batch["image"]), file=file)


class Fault(L.Callback):
    """Happens in the midst of a step."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Any) -> None:
        struck = 0 if self.kind == "exception of the first" else 1
        if trainer.global_step != FAULT or trainer.global_rank != struck:
            return
        (self.folder / "fault").touch()
        if self.kind.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.kind])
        if self.kind.startswith("exception"):
            raise ArithmeticError("on purpose")
        if self.kind == "broken file":
            break_a_file_of_rank_1(trainer.train_dataloader.sampler)


def break_a_file_of_rank_1(sampler: Any) -> None:
    """One that comes in the next micro-batch, and not to rank 0."""
    index = sampler.order(1)[(FAULT + 1) % BATCHES * BATCH_SIZE * 2 + 1]
    path = sampler.dataset.files.paths[index]
    path.write_bytes(path.read_bytes()[:40])


class Stalling(ld.DiffusionModule):
    """Hangs in a step; the thread that watches does not."""

    kind = ""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if (self.kind, self.global_rank, self.trainer.global_step) == ("stall", 1, FAULT):
            (Path(self.trainer.default_root_dir) / "fault").touch()
            time.sleep(1000)
        return super().training_step(batch, batch_idx)


def train(rank: int, folder: Path, images: Path, kind: str, attempt: int) -> None:
    errors = open(folder / f"errors-{attempt}-{rank}.txt", "a")  # noqa: SIM115
    os.dup2(errors.fileno(), 2)
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    module = Stalling(ld.UNet((1, 8, 8), channels=8, num_blocks=1))
    module.kind = kind
    callbacks = [RankWatchdog(3.0, 3.0, 3.0), Diary(folder / f"seen-{attempt}"), EMA(0.9), SaveOnSignal()]
    trainer = L.Trainer(
        **QUIET | {"enable_checkpointing": True}, default_root_dir=folder, devices=2, strategy="ddp",
        callbacks=[*callbacks, LastCheckpoint(3), Fault(kind, folder)], max_epochs=EPOCHS,
        plugins=[ld.AtomicCheckpointIO()], num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    last = folder / "checkpoints" / "last.ckpt"
    data = ImageFolderDataModule(images, 8, BATCH_SIZE, 1, held_out=0.0, in_memory=False, num_workers=0)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    if rank == 0:
        torch.save(module.state_dict(), folder / "end.pt")


def begin(folder: Path, images: Path, kind: str, attempt: int) -> list[int]:
    folder.mkdir(exist_ok=True)
    port = free_port()
    return [
        start(train, rank, folder, images, kind, attempt, **environment_of(rank, 2, port))
        for rank in range(2)
    ]


def await_end(jobs: dict[Path, list[int]], attempt: int = 0, limit: float = 90.0) -> None:
    """All jobs, which run beside each other; what is left after `limit` seconds is killed."""
    until, faults = time.monotonic() + limit, dict[Path, float]()
    ends: dict[Path, list[int | None]] = {folder: [None, None] for folder in jobs}
    while any(None in statuses for statuses in ends.values()):
        for folder, ranks in jobs.items():
            if (folder / "fault").exists():
                faults.setdefault(folder, time.monotonic())
            kill_what_nobody_would(folder, ranks, ends[folder], time.monotonic() > until)
            if note_ends(ranks, ends[folder]):
                seconds = time.monotonic() - faults.get(folder, time.monotonic())
                said = json.dumps({"seconds": seconds, "statuses": ends[folder]})
                (folder / f"ended-{attempt}.json").write_text(said)
        time.sleep(0.02)


def kill_what_nobody_would(folder: Path, ranks: list[int], ends: list[int | None], too_late: bool) -> None:
    """Here no launcher kills the stopped rank once the other has ended."""
    stopped = folder.name == "SIGSTOP" and ends[0] is not None
    for pid, end in zip(ranks, ends, strict=True):
        if end is None and (too_late or stopped):
            os.kill(pid, signal.SIGKILL)


def note_ends(ranks: list[int], ends: list[int | None]) -> bool:
    """Whether another one has ended."""
    before = list(ends)
    for rank, pid in enumerate(ranks):
        done, status = os.waitpid(pid, os.WNOHANG) if ends[rank] is None else (0, 0)
        ends[rank] = os.waitstatus_to_exitcode(status) if done else ends[rank]
    return ends != before


def main(folder: Path) -> None:
    jobs = {}
    for kind in (*FAULTS, "none"):
        for number in range(BATCHES * BATCH_SIZE * 2):
            save(folder / f"{kind} images" / f"{number:02}.png", np.full((8, 8), 3 * number))
        jobs[folder / kind] = begin(folder / kind, folder / f"{kind} images", kind, 0)
    await_end(jobs)
    again = shutil.copytree(folder / "SIGKILL", folder / "resumed")
    await_end({again: begin(again, folder / "none images", "none", 1)}, attempt=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
