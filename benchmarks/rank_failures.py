"""Something happens to one of two ranks: how soon have all ended, what do they say, and is anything lost?

    OMP_NUM_THREADS=1 python benchmarks/rank_failures.py [--kills 10] [--faults NAMES] [--faults-only | --kills-only]

The digits job on two processes (DDP over gloo). First every fault under Lightning's own launcher and under torchrun,
with the default patience of `RankWatchdog`: seconds from the fault until every rank that was not stopped had ended, and
until every process of the job was gone. Then `--kills` SIGKILLs of one drawn rank at drawn moments, each followed by a
resumption from the last checkpoint, against a run without: images are counted in the steps that the final weights have
been through.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

import lightning_diffusion as ld
from lightning_diffusion.callbacks import EMA, LastCheckpoint, RankWatchdog
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.datamodules.images import BrokenImageError
from lightning_diffusion.io import load_checkpoint

FAULTS = ("SIGKILL", "SIGSTOP", "SIGSTOP of the first", "exception", "broken file", "endless step")
SAYS = r"(?:rank \d+ \(.*?\) (?:ended without|has not|failed)|no rank has got on).*"
BATCH, EVERY, EPOCHS, STRUCK = 50, 5, 7, 12


class Numbered(DigitsDataModule):
    """Batches say which images they hold."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def training_data(self) -> Any:
        data, read = super().training_data(), type(super().training_data()).__getitems__
        kind = {"__getitems__": lambda own, chosen: read(own, chosen) | {"index": torch.as_tensor(chosen)}}
        data.__class__ = type("Numbered", (type(data),), kind)
        return data


class Trouble(L.Callback):
    """Writes down the images of every step, and strikes.

    Args:
        given: of the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.folder, self.fault, self.attempt = Path(given.folder), given.fault, given.attempt

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        with open(self.folder / f"seen-{self.attempt}-{trainer.global_rank}.txt", "a") as file:
            print(trainer.global_step, trainer.current_epoch, *batch["index"].tolist(), file=file)

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Any) -> None:
        struck = 0 if self.fault and self.fault.endswith("of the first") else 1
        if not self.fault or trainer.global_step != STRUCK or trainer.global_rank != struck:
            return
        (self.folder / "fault").touch()
        if self.fault.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.fault.split()[0]])
        if self.fault == "exception":
            raise ArithmeticError("on purpose")
        if self.fault == "broken file":
            raise BrokenImageError("found a file that is no whole image: 'photos/7.png'.")


class Endless(ld.DiffusionModule):
    """May hang in a step, on rank 1."""

    fault: str | None = None
    folder = Path()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if (self.fault, self.global_rank, self.global_step) == ("endless step", 1, STRUCK):
            (self.folder / "fault").touch()
            time.sleep(1000)
        return super().training_step(batch, batch_idx)


def train(given: argparse.Namespace) -> None:
    """One rank, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)
    folder = Path(given.folder)
    module = Endless(
        ld.UNet((1, 8, 8), channels=8, num_blocks=1, num_classes=10), representation=ld.Standardize()
    )
    module.fault, module.folder = given.fault, folder
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=EPOCHS, logger=False, enable_progress_bar=False,
        callbacks=[RankWatchdog(), Trouble(given), EMA(0.9), LastCheckpoint(EVERY)], enable_model_summary=False,
        plugins=[ld.AtomicCheckpointIO()], default_root_dir=folder, num_sanity_val_steps=0, limit_val_batches=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(module, datamodule=Numbered(BATCH), ckpt_path=last if last.exists() else None)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "end.pt")


def begin(folder: Path, launcher: str, fault: str = "", attempt: int = 0) -> subprocess.Popen[bytes]:
    """Both ranks, in a session of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [sys.executable, *(torchrun if launcher == "torchrun" else []), os.path.abspath(__file__)]
    line += ["--folder", str(folder), "--fault", fault, "--attempt", str(attempt), "--rank"]
    return subprocess.Popen(
        line, start_new_session=True, stderr=open(folder / f"errors-{attempt}.txt", "wb"),
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


class Member(NamedTuple):
    """A process of a job that has not ended: a rank, which may be stopped, or torchrun."""

    pid: int
    is_stopped: bool
    is_torchrun: bool

    @property
    def is_running_rank(self) -> bool:
        return not (self.is_stopped or self.is_torchrun)


def members(folder: Path) -> list[Member]:
    """Of a job."""
    found = subprocess.run(["ps", "-eo", "pid=,stat=,args="], capture_output=True, text=True, check=False)
    lines = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
    own = [line for line in lines if f"{folder} " in line[2] and not line[1].startswith("Z")]
    return [
        Member(int(pid), state.startswith("T"), "torch.distributed.run" in args) for pid, state, args in own
    ]


def strike(root: Path, launcher: str, fault: str) -> str:
    """One row of the table."""
    folder = root / launcher / fault.replace(" ", "-")
    job = begin(folder, launcher, fault)
    while not (folder / "fault").exists() and job.poll() is None:
        time.sleep(0.05)
    struck = time.monotonic()
    others = math.inf
    while (left := members(folder)) and time.monotonic() - struck < 120:
        if not any(one.is_running_rank for one in left):
            others = min(others, time.monotonic() - struck)
        job.poll()
        time.sleep(0.1)
    seconds = time.monotonic() - struck
    for one in left:
        os.kill(one.pid, signal.SIGKILL)
    said = re.findall(SAYS, (folder / "errors-0.txt").read_text())
    step = load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"]
    ended = f"{seconds:.0f}" if not left else "more than 120"
    cells = (
        launcher,
        fault,
        f"{min(others, seconds):.0f}",
        ended,
        job.wait(),
        step,
        said[0] if said else "nothing",
    )
    return f"| {' | '.join(map(str, cells))} |"


def kill_and_resume(root: Path, kills: int) -> None:
    """Ten kills of one rank, then the comparison."""
    straight, killed, draw = root / "straight", root / "killed", random.Random(0)
    job = begin(straight, "torchrun")
    job.wait()
    for attempt in range(kills):
        job = begin(killed, "torchrun", attempt=attempt)
        seen = killed / f"seen-{attempt}-0.txt"
        steps = EVERY + draw.randrange(3)  # the next checkpoint, and up to two steps; then a part of a step
        while job.poll() is None and (not seen.exists() or len(seen.read_text().splitlines()) < steps):
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        ranks = [one.pid for one in members(killed) if not one.is_torchrun]
        os.kill(draw.choice(ranks), signal.SIGKILL)
        job.wait()
    status = begin(killed, "torchrun", attempt=kills).wait()
    told(straight, killed, kills, status)


def told(straight: Path, killed: Path, kills: int, status: int) -> None:
    expected, found = steps_of(straight), steps_of(killed)
    weights = [torch.load(folder / "end.pt") for folder in (straight, killed)]
    same = all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    taken = sum(len(file.read_text().splitlines()) for file in killed.glob("seen-*-0.txt"))
    print(f"\n{kills} kills of one rank at drawn moments; the last attempt ended with status {status}.")
    for epoch in range(EPOCHS):
        images = [i for (_, e, _), those in found.items() if e == epoch for i in those]
        print(
            f"epoch {epoch}: {len(images)} images, times each came: {dict(Counter(Counter(images).values()))}"
        )
    print(
        f"steps that the weights went through: {len(found) // 2}, the same images as without kills: {found == expected}"
    )
    print(
        f"weights bit-equal to those without kills: {same}; {taken - len(found) // 2} steps were taken again."
    )


def steps_of(folder: Path) -> dict[tuple[int, int, int], list[int]]:
    """Images by (step, epoch, rank), as the last attempt that took the step had them."""
    kept: dict[tuple[int, int, int], list[int]] = {}
    for file in sorted(folder.glob("seen-*.txt"), key=lambda file: int(file.stem.split("-")[1])):
        for line in file.read_text().splitlines():
            step, epoch, *images = map(int, line.split())
            kept[step, epoch, int(file.stem.split("-")[2])] = images
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--faults-only", action="store_true")
    parser.add_argument("--faults", nargs="*", default=FAULTS)
    parser.add_argument("--kills-only", action="store_true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--fault", default="", help=argparse.SUPPRESS)
    parser.add_argument("--attempt", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        train(given)
        return
    with tempfile.TemporaryDirectory() as root:
        if not given.kills_only:
            print(
                "| launcher | what happens | seconds, the others | all | status | checkpoint of step | the others say |"
            )
            print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
            for launcher in ("Lightning", "torchrun"):
                for fault in given.faults:
                    print(strike(Path(root), launcher, fault), flush=True)
        if not given.faults_only:
            kill_and_resume(Path(root), given.kills)


if __name__ == "__main__":
    main()
