"""Training runs that are really stopped: one process imports everything once, then forks a child for each run.

Reads one request a line, JSON of the fields of `Run`, and answers with the child's status: 0, its exit code, or
minus the signal that killed it. A run leaves `result.pt`, `trace.txt` and `checkpoints/` in its folder.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

EPOCHS, BATCHES, BATCH_SIZE = 3, 7, 128


def steps_per_epoch(accumulate: int) -> int:
    """Optimizer steps; the last window of an epoch is a short one."""
    return math.ceil(BATCHES / accumulate)


@dataclass(frozen=True)
class Run:
    """One training run on the digits.

    Args:
        folder: where it writes.
        workers: of the loader.
        accumulate: micro-batches per optimizer step.
        limit: "max_epochs" or "max_steps".
        kind: what stops it, "SIGKILL", "SIGTERM" or "exception"; None for nothing.
        epoch, batch: where it is stopped; batch -1 is the end of the epoch.
        save_every: optimizer steps between checkpoints.
        resume: the checkpoint to go on from.
    """

    folder: str
    workers: int = 0
    accumulate: int = 1
    limit: str = "max_epochs"
    kind: str | None = None
    epoch: int = 0
    batch: int = 0
    save_every: int = 2
    resume: str | None = None


class Server:
    """The process that forks; `Server()(run)` waits for a run and returns its status."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PL_GLOBAL_SEED": "5"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, run: Run) -> int:
        Path(run.folder).mkdir(parents=True, exist_ok=True)
        print(json.dumps(asdict(run)), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    import sklearn.datasets  # noqa: F401
    import torch

    import lightning_diffusion.callbacks
    import lightning_diffusion.datamodules
    import lightning_diffusion.module  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            in_child(Run(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def in_child(run: Run) -> None:
    """Train, then end without the parent's clean-up."""
    status, log = 1, open(Path(run.folder, "log.txt"), "a")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        train(run)
        status = 0
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def train(run: Run) -> None:
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_diffusion import AtomicCheckpointIO, DiffusionModule, Heun, Standardize, UNet, WarmupCosine
    from lightning_diffusion.callbacks import EMA, SaveOnSignal
    from lightning_diffusion.datamodules import DigitsDataModule

    folder = Path(run.folder)
    L.seed_everything(5, verbose=False)
    network = UNet(
        [1, 8, 8], 8, multipliers=[1], num_blocks=1, attention_levels=[], num_classes=10, dropout=0.1
    )
    learning_rate = WarmupCosine(warmup_steps=0, warmup_images=8 * BATCH_SIZE)
    module = DiffusionModule(network, representation=Standardize(), learning_rate=learning_rate)
    data = DigitsDataModule(BATCH_SIZE, held_out=0.5, num_workers=run.workers)
    epochs = run.limit == "max_epochs"
    limit = {run.limit: EPOCHS if epochs else EPOCHS * steps_per_epoch(run.accumulate)}
    checkpoints = ModelCheckpoint(
        folder / "checkpoints",
        save_top_k=0,
        every_n_train_steps=run.save_every,
        save_last=True,
        save_on_exception=run.kind == "exception",
    )
    trainer = L.Trainer(
        accelerator="cpu",
        plugins=[AtomicCheckpointIO()],
        callbacks=[Trace(folder / "trace.txt"), stopper(run), EMA(decay=0.9), SaveOnSignal(), checkpoints],
        default_root_dir=folder,
        accumulate_grad_batches=run.accumulate,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limit,
    )
    trainer.fit(module, datamodule=data, ckpt_path=run.resume)
    trainer.save_checkpoint(folder / "end.ckpt")
    label = {"label": torch.arange(4)}
    samples = {w: module.sample(4, label, sampler=Heun(4), seed=1, weights=w) for w in ("online", "ema")}
    torch.save(samples, folder / "samples.pt")


def stopper(run: Run):
    from lightning.pytorch.callbacks import Callback

    class Stop(Callback):
        """Ends the run at its place: in the midst of a micro-batch, or between the end of an epoch and the next."""

        def on_after_backward(self, trainer, module):
            batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            if (trainer.current_epoch, batches - 1) == (run.epoch, run.batch):
                self.stop()

        def on_train_epoch_end(self, trainer, module):
            if run.batch == -1 and trainer.fit_loop.epoch_progress.current.ready == run.epoch + 1:
                self.stop()

        def stop(self):
            if run.kind == "exception":
                raise RuntimeError("stopped on purpose")
            if run.kind:
                os.kill(os.getpid(), signal.Signals[run.kind])

    return Stop()


def Trace(path: Path):  # noqa: N802
    from lightning.pytorch.callbacks import Callback

    class Tracing(Callback):
        """Writes a line per micro-batch: epoch, index, steps taken, steps that loggers count, loss, learning rate."""

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            counted = trainer.fit_loop.epoch_loop._batches_that_stepped
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            loss = outputs["loss"].item().hex()
            with path.open("a") as file:
                print(trainer.current_epoch, batch_idx, trainer.global_step, counted, loss, rate, file=file)

    return Tracing()


if __name__ == "__main__":
    serve()
