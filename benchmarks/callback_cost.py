"""What do callbacks add to a training step?

    OMP_NUM_THREADS=1 python benchmarks/callback_cost.py [--sets monitor gradients] [--rounds 12] [--clock cpu]

The same U-Net of 10 M parameters is trained without callbacks and with each set of them, in one process that turns to
the next arm after every block of steps, in changing order. A block is one logging interval, so what logging costs is in
it. Figures are ratios of neighbouring blocks, with a set over without: median and quartiles over rounds. The clock of
the processor (all threads of this process) disregards other work on the machine.

    monitor     NoiseLevelMonitor; bound 2 %
    gradients   LossScaleMonitor, SpikeGuard, GradientSanitizer, AdaptiveGradientClipping, GradientClipping together;
                bound 3 %
    nothing     none: how far off the ratio 1 is by chance

On a noisy machine those ratios are off by several percent. Below them stands what is spent inside the callbacks' own
hooks, as a share of the same steps: median and quartiles over blocks.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import partial, wraps

import numpy as np
import torch
from interleaved import Times, in_turns, spread
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from step_overhead import CLOCKS, Baton, Pace

from lightning_diffusion import EDM, DiffusionModule, Standardize, UNet
from lightning_diffusion.callbacks import (
    AdaptiveGradientClipping,
    GradientClipping,
    GradientSanitizer,
    LossScaleMonitor,
    NoiseLevelMonitor,
    SpikeGuard,
)
from lightning_diffusion.datamodules import DigitsDataModule

SETS: dict[str, Callable[[], list[Callback]]] = {
    "nothing": list,
    "monitor": lambda: [NoiseLevelMonitor(picture_every_n_steps=10**9)],
    "gradients": lambda: [
        LossScaleMonitor(),
        SpikeGuard(),
        GradientSanitizer(),
        AdaptiveGradientClipping(),
        GradientClipping(),
    ],
}
BOUNDS = {"nothing": 0.0, "monitor": 0.02, "gradients": 0.03}


def network() -> UNet:
    """10.5 M parameters at 8 x 8 pixels: little arithmetic for its size, so that what is added weighs most."""
    return UNet((1, 8, 8), channels=112, multipliers=(1, 2), num_blocks=2, num_classes=10)


class Inside:
    """Milliseconds spent in the hooks of callbacks in each block of steps, measured from within.

    A hook that another one calls is counted once.
    """

    def __init__(self, callbacks: list[Callback], clock: Callable[[], float]) -> None:
        self.clock, self.spent, self.depth, self.blocks = clock, 0.0, 0, list[float]()
        for callback in callbacks:
            for name in (name for name in dir(callback) if name.startswith("on_")):
                setattr(callback, name, self.timed(getattr(callback, name)))

    def timed(self, hook: Callable[..., object]) -> Callable[..., object]:
        @wraps(hook)
        def run(*args: object, **kwargs: object) -> object:
            self.depth += 1
            began = self.clock()
            try:
                return hook(*args, **kwargs)
            finally:
                self.depth -= 1
                self.spent += 0 if self.depth else 1e3 * (self.clock() - began)

        return run

    def end_block(self, steps: int) -> None:
        self.blocks.append(self.spent / steps)
        self.spent = 0.0


def train(callbacks: list[Callback], baton: Baton, batch_size: int, folder: str) -> None:
    """One arm: trains at the baton's pace."""
    module = DiffusionModule(network(), EDM(), Standardize())
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=[*callbacks, Pace(baton)],
        logger=CSVLogger(folder, flush_logs_every_n_steps=baton.steps),
        log_every_n_steps=baton.steps,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size))


def compare(names: list[str], arguments: argparse.Namespace, folder: str) -> tuple[Times, Times]:
    """Milliseconds per step of each arm in each round, and inside its callbacks, after one round of warming up."""
    arms = {"without": [], **{name: SETS[name]() for name in names}}
    inside = {name: Inside(callbacks, CLOCKS[arguments.clock]) for name, callbacks in arms.items()}
    batons = {name: Baton(arguments.steps, CLOCKS[arguments.clock]) for name in arms}
    threads = [
        threading.Thread(
            target=partial(train, callbacks, batons[name], arguments.batch_size, folder), daemon=True
        )
        for name, callbacks in arms.items()
    ]
    for thread in threads:
        thread.start()
    blocks = {name: partial(run_block, baton, inside[name]) for name, baton in batons.items()}
    times = in_turns(blocks, arguments.rounds, warm_up=1)
    for baton, thread in zip(batons.values(), threads, strict=True):
        baton.stop = True
        baton.go.release()
        thread.join()
    return times, {name: np.array(watched.blocks[1:]) for name, watched in inside.items()}


def run_block(baton: Baton, inside: Inside) -> float:
    block = baton.run_block()
    inside.end_block(baton.steps)
    return block


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10, help="in a block, which is a logging interval")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size = sum(p.numel() for p in network().parameters()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        times, inside = compare(arguments.sets, arguments, folder)
    print(
        f"{size:.1f} M parameters, batch {arguments.batch_size}, logging every {arguments.steps} steps, "
        f"{torch.get_num_threads()} thread(s), {arguments.clock} clock: median (quartiles)"
    )
    print(f"without     {spread(times['without'], 1)} ms per step")
    for name in arguments.sets:
        ratios = times[name] / times["without"]
        kept = "kept" if np.median(ratios) <= 1 + BOUNDS[name] else "BROKEN"
        bound = f"  bound {1 + BOUNDS[name]:.2f} {kept}" if BOUNDS[name] else ""
        print(f"{name:<12}{spread(ratios, 3)} of that{bound}")
    for name in arguments.sets:
        share = inside[name] / (times[name] - inside[name])
        print(f"{name:<12}{spread(share, 4)} of a step is spent inside its hooks")


if __name__ == "__main__":
    main()
