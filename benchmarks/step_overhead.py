"""What does our code add to a training step?

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py [--network digits|small|tiny] [--rounds 60] [--clock cpu]

Three arms train the same U-Net on the digits with the same maths, fused AdamW and an average of the weights after
every step, in one process that turns to another one after every epoch:

    hand       a loop written by hand: tensors in memory, torch._foreach_lerp_
    lightning  the same lines in a quiet LightningModule, no logger and no progress bar
    ours       DiffusionModule, its report and checks, PowerFunctionEMA and DigitsDataModule in the same Trainer

`ours - lightning` is what our code adds; bound: 0.5 ms. A figure is the mean over a whole epoch, so that what its
turn costs is in it; differences are between neighbours in time, median and quartiles over rounds. The network's
own time only adds noise to them, some thirty times the figure: `small` is a U-Net of one level and one block, `tiny`
one convolution. The processor's clock (all threads of this process) disregards other work on the machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from interleaved import Times, in_turns, spread
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_diffusion import EDM, DiffusionModule, LogNormalSigma, StableTarget, Standardize, UNet
from lightning_diffusion.callbacks import PowerFunctionEMA
from lightning_diffusion.datamodules import DigitsDataModule

BATCH, BOUND = 64, 0.5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SIGMA_DATA, P_MEAN, P_STD, DROPOUT, SIGMA_REL = 0.5, -1.2, 1.2, 0.1, 0.1


class Baton:
    """Lets one of several threads run for a block of steps, and keeps the mean time of a step in each block."""

    def __init__(self, steps: int, clock: Callable[[], float]) -> None:
        self.steps, self.clock, self.count, self.blocks = steps, clock, 0, list[float]()
        self.go, self.done, self.stop = threading.Semaphore(0), threading.Semaphore(0), False

    def wait(self) -> bool:
        """Called by the arm before its first step: false if it is over."""
        self.go.acquire()
        self.started = self.clock()
        return not self.stop

    def step(self) -> bool:
        """Called by the arm after each step: false if it is over."""
        self.count += 1
        if self.count % self.steps:
            return True
        self.blocks.append(1e3 * (self.clock() - self.started) / self.steps)
        self.done.release()
        return self.wait()

    def run_block(self) -> float:
        """Called by the main thread: milliseconds per step of the arm's next block."""
        self.go.release()
        self.done.acquire()
        return self.blocks[-1]


class Hand:
    """Everything that a training step needs, written by hand."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.network, self.labels = network, labels
        self.images = (images - images.mean()) * (SIGMA_DATA / images.std())
        self.parameters = list(network.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.exponent = float(np.roots([1, 7, 16 - SIGMA_REL**-2, 12 - SIGMA_REL**-2]).real.max()) + 1
        self.taken = 0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order."""
        order = torch.randperm(len(self.images))
        for i in range(len(order) // BATCH):
            chosen = order[i * BATCH : (i + 1) * BATCH]
            yield self.images[chosen], self.labels[chosen]

    def loss(self, x0: Tensor, label: Tensor) -> Tensor:
        """Karras et al. 2022, on the residual of unit variance, with stratified levels and label dropout."""
        u = (torch.randperm(BATCH) + torch.rand(BATCH, dtype=torch.float64)) / BATCH
        sigma = (P_MEAN + P_STD * torch.special.ndtri(u)).exp().float()[:, None, None, None]
        label = torch.where(torch.rand(BATCH) < DROPOUT, 10, label)
        noise, total = torch.randn_like(x0), sigma**2 + SIGMA_DATA**2
        output = self.network((x0 + sigma * noise) / total.sqrt(), sigma.flatten().log() / 4, label=label)
        x_bar = self.posterior_mean(x0 + sigma * noise, sigma, label)
        eps_bar = (x0 + sigma * noise - x_bar) / sigma
        return (output - (sigma / SIGMA_DATA * x_bar - SIGMA_DATA * eps_bar) / total.sqrt()).square().mean()

    def posterior_mean(self, x_t: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """Xu et al. 2023, over all training digits of the label."""
        distance = torch.cdist(x_t.flatten(1), self.images.flatten(1))
        logits = -(distance**2) / (2 * sigma.flatten(1) ** 2)
        allowed = (label[:, None] == self.labels) | (label[:, None] == 10)
        weights = logits.masked_fill(~allowed, -torch.inf).softmax(1)
        return (weights @ self.images.flatten(1)).view_as(x_t)

    @torch.no_grad()
    def update_average(self) -> None:
        """Karras et al. 2024, eq. 123 and 127."""
        self.taken += 1
        torch._foreach_lerp_(self.average, self.parameters, 1 - (1 - 1 / self.taken) ** self.exponent)


class Quiet(LightningModule):
    """The hand-written lines in Lightning's hooks."""

    def __init__(self, hand: Hand) -> None:
        super().__init__()
        self.network, self.hand = hand.network, hand

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.hand.loss(*batch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.hand.update_average()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Any:
        return Epochs(self.hand)


class Epochs:
    """An iterable of the hand's batches, afresh in every epoch."""

    def __init__(self, hand: Hand) -> None:
        self.hand = hand

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.hand.batches()

    def __len__(self) -> int:
        return len(self.hand.images) // BATCH


class Pace(Callback):
    """Steps at the baton's pace."""

    def __init__(self, baton: Baton) -> None:
        self.baton = baton

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self.baton.wait()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        trainer.should_stop = not self.baton.step()


def digits() -> UNet:
    """The network of configs/digits.yaml."""
    return UNet((1, 8, 8), channels=24, num_blocks=1, attention_levels=(), num_classes=10)


def small() -> UNet:
    """As few operations as a U-Net can have."""
    return UNet((1, 8, 8), channels=8, multipliers=(1,), num_blocks=1, attention_levels=(), num_classes=10)


class Tiny(nn.Module):
    """The least that can be trained: one 3 x 3 convolution."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.convolution(x)


def warm_up(step: int) -> float:
    """DiffusionModule's default learning rate."""
    return min((step + 1) / 101, 1.0)


def run_hand(hand: Hand, baton: Baton) -> None:
    optimizer = torch.optim.AdamW(hand.parameters, lr=1e-3, fused=True)
    going = baton.wait()
    while going:
        for batch in hand.batches():
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * warm_up(hand.taken)
            optimizer.zero_grad()
            hand.loss(*batch).backward()
            optimizer.step()
            hand.update_average()
            if not (going := baton.step()):
                break


def run_ours(network: nn.Module, baton: Baton) -> None:
    module = DiffusionModule(
        network,
        EDM(SIGMA_DATA, LogNormalSigma(P_MEAN, P_STD), stable_target=StableTarget(reference_size=2000)),
        Standardize(sigma_data=SIGMA_DATA),
        label_dropout=DROPOUT,
    )
    quiet_trainer(baton, PowerFunctionEMA(SIGMA_REL)).fit(module, datamodule=DigitsDataModule(BATCH))


def quiet_trainer(baton: Baton, *callbacks: Callback) -> Trainer:
    """No logger, no progress bar, no checkpoints, no validation."""
    return Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=[*callbacks, Pace(baton)],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def compare(network: Callable[[], nn.Module], rounds: int, clock: Callable[[], float]) -> Times:
    """Milliseconds per step of each arm in each round."""
    torch.manual_seed(0)
    data = DigitsDataModule(BATCH).training_data()
    networks = [network() for _ in range(3)]
    hands = [Hand(network, data.images, data.labels) for network in networks[:2]]  # type: ignore[arg-type]
    arms = {
        "hand": partial(run_hand, hands[0]),
        "lightning": lambda baton: quiet_trainer(baton).fit(Quiet(hands[1])),
        "ours": partial(run_ours, networks[2]),
    }
    steps = len(data) // BATCH
    batons = {name: Baton(steps, clock) for name in arms}
    threads = [threading.Thread(target=arm, args=(batons[name],), daemon=True) for name, arm in arms.items()]
    for thread in threads:
        thread.start()
    times = in_turns({name: baton.run_block for name, baton in batons.items()}, rounds, warm_up=1)
    for baton, thread in zip(batons.values(), threads, strict=True):
        baton.stop = True
        baton.go.release()
        thread.join()
    return times


NETWORKS: dict[str, Callable[[], nn.Module]] = {"digits": digits, "small": small, "tiny": Tiny}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=list(NETWORKS), default="digits")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times = compare(NETWORKS[arguments.network], arguments.rounds, CLOCKS[arguments.clock])
    pairs = [("lightning", "hand"), ("ours", "lightning"), ("ours", "hand")]
    added = {f"{a} - {b}": times[a] - times[b] for a, b in pairs}
    print(
        f"milliseconds ({arguments.clock}) per step, {torch.get_num_threads()} thread(s): median (quartiles)"
    )
    for name, values in {**times, **added}.items():
        print(f"{name:<18}{spread(values, 3)}")
    print(f"ours / hand       {spread(times['ours'] / times['hand'], 3)}")
    ours = float(np.median(added["ours - lightning"]))
    print(f"ours - lightning: bound {BOUND} ms", "kept" if ours <= BOUND else "BROKEN")
    print(json.dumps({name: float(np.median(values)) for name, values in {**times, **added}.items()}))


if __name__ == "__main__":
    main()
