"""What makes a stopped run go on exactly where it stopped.

Every random number of a training step is a function of (seed, purpose, epoch, micro-batch index), never of
what was drawn before: nothing about random numbers has to be saved. Draws that must not depend on the number
of processes (noise levels, label drops, augmentation) are made for the global batch and sliced by rank:
sample j on rank r is number j * world_size + r of the global batch, which is how `ResumableSampler` deals
them out.

The place of a run is an epoch and the number of its micro-batches that are done, rounded down to the first
one of an accumulation window: gradients of half a window are not kept, the window is done again, the same
way.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


def run_seed() -> int:
    """The seed given to `lightning.seed_everything` (PL_GLOBAL_SEED), else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def hash_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same on every machine and Python version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class RandomKey:
    """Where in a run random numbers are drawn.

    Args:
        seed: the run's seed.
        epoch, batch: epoch, and index of the micro-batch within it.
        accumulate: micro-batches per optimizer step.
        rank, world_size: this process among how many.
    """

    seed: int = 0
    epoch: int = 0
    batch: int = 0
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator that is the same on all ranks."""
        seed = hash_seed(self.seed, purpose, self.epoch, self.batch)
        return torch.Generator(device).manual_seed(seed)

    def local_generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator of this rank's own."""
        seed = hash_seed(self.seed, purpose, self.epoch, self.batch, self.rank)
        return torch.Generator(device).manual_seed(seed)

    def uniform(self, purpose: str, batch: int) -> Tensor:
        """This rank's share of uniform draws for the global batch, float64 on the CPU, shape (batch,)."""
        generator = self.generator(purpose)
        draws = torch.rand(batch * self.world_size, dtype=torch.float64, generator=generator)
        return draws if self.world_size == 1 else draws[self.rank :: self.world_size]

    def stratified_uniform(self, purpose: str, batch: int) -> Tensor:
        """Like `uniform`, one draw in each of n equal strata of [0, 1), n the samples of an optimizer step.

        Sample g of the global batch, in micro-batch a of the step, takes stratum (g A + a + S) mod n; the
        shift S is drawn once per step, so that no place in the batch keeps its stratum and each u is exactly
        uniform.
        """
        samples = batch * self.world_size
        n, window = samples * self.accumulate, self.batch // self.accumulate
        shift = hash_seed(self.seed, purpose, "shift", self.epoch, window) % n
        first = self.rank * self.accumulate + self.batch % self.accumulate + shift
        step = self.world_size * self.accumulate
        stratum = torch.arange(first, first + batch * step, step) % n
        return self.uniform(purpose, batch).add_(stratum).div_(n)


class ResumableSampler(DistributedSampler[int]):
    """Deals the indices of a dataset out to the processes in an order that is a function of (seed, epoch).

    The first epoch after resuming can begin in its midst (`start_at`); its length stays that of a whole
    epoch, as the Trainer counts the batches done before. Lightning leaves subclasses of DistributedSampler
    alone.

    Args:
        dataset: anything with a length.
        num_replicas, rank: this process among how many.
        shuffle: a new order in every epoch, else the order of the dataset.
        seed: by default the run's seed.
        drop_last: leave out what does not divide among the processes, else repeat the first samples.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int | None = None,
        drop_last: bool = True,
    ) -> None:
        seed = run_seed() if seed is None else seed
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self.start = Place(0, 0)

    def start_at(self, epoch: int, samples: int) -> None:
        """Begin in `epoch`, after `samples` samples of this process; every other epoch is whole."""
        self.epoch, self.start = epoch, Place(epoch, samples)

    def order(self, epoch: int) -> Tensor:
        """All indices of an epoch, in order, for all processes, shape (len(dataset),)."""
        size = len(self.dataset)  # type: ignore[arg-type]
        if not self.shuffle:
            return torch.arange(size)
        generator = torch.Generator().manual_seed(hash_seed(self.seed, "order", epoch))
        return torch.randperm(size, generator=generator)

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        order = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        first = self.start.done if self.epoch == self.start.epoch else 0
        return iter(order[self.rank :: self.num_replicas][first:].tolist())


class StreamSampler(ResumableSampler):
    """Numbers that never repeat, for data made on demand: epoch e of n samples is e n, ..., (e + 1) n - 1."""

    def order(self, epoch: int) -> Tensor:
        """The numbers of an epoch, in order, for all processes, shape (len(dataset),)."""
        size = len(self.dataset)  # type: ignore[arg-type]
        return torch.arange(epoch * size, (epoch + 1) * size)


class Place(NamedTuple):
    """Where a run goes on: in which epoch, after how many of its micro-batches (or samples) are done."""

    epoch: int
    done: int


def place_of(fit_loop: dict[str, Any], accumulate: int) -> Place:
    """The place at which a run with this state of Lightning's fit loop goes on.

    Right in every hook: after a micro-batch, in validation, at the end of an epoch and of the fit, on an
    exception anywhere in a step, and where `max_steps` ended an epoch before its last batch.
    """
    epochs, batches = fit_loop["epoch_progress"]["total"], fit_loop["epoch_loop.batch_progress"]
    done = batches["current"]["processed"]
    finished = batches["is_last_batch"] and done == batches["current"]["ready"]
    if epochs["started"] == 0 or epochs["ready"] > epochs["started"] or finished:
        return Place(epochs["started"], 0)
    return Place(epochs["started"] - 1, done - done % accumulate)


def put_(fit_loop: dict[str, Any], place: Place) -> None:
    """Edit the state of Lightning's fit loop so that a run restored from it goes on at `place`.

    All places take the one form that Lightning's restart handles best, "saved at the end of a micro-batch":
    it adds the last count (`completed`, the steps seen by loggers) itself. At the start of an epoch that
    epoch is announced (`ready`) but not started, so that its hooks run. A validation that was due is not
    made up for.
    """
    batches, begun = fit_loop["epoch_loop.batch_progress"], place.done > 0
    in_last_epoch = place.epoch < fit_loop["epoch_progress"]["total"]["started"]
    undone = batches["current"]["processed"] - place.done if in_last_epoch else 0
    total = batches["total"]["processed"] - undone
    batches.update(total=_saved_after(total), current=_saved_after(place.done), is_last_batch=False)
    for counts in fit_loop["epoch_progress"].values():
        epoch = place.epoch
        counts.update(ready=epoch + 1, started=epoch + begun, processed=epoch, completed=epoch)
    _forget_unfinished_(fit_loop, keep_current=begun)


def _saved_after(batches: int) -> dict[str, int]:
    return {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}


def _forget_unfinished_(fit_loop: dict[str, Any], keep_current: bool) -> None:
    """Count only optimizer and scheduler steps that were taken; validation starts afresh."""
    optimizer = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    scheduler = fit_loop["epoch_loop.scheduler_progress"]
    for scope in ("total", "current"):
        keep = scope == "total" or keep_current
        taken = optimizer["step"][scope]["completed"] * keep
        _set_all_(optimizer["step"][scope], taken)
        _set_all_(optimizer["zero_grad"][scope], taken)
        _set_all_(scheduler[scope], scheduler[scope]["completed"] * keep)
        _set_all_(fit_loop["epoch_loop.val_loop.batch_progress"][scope], 0)
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = optimizer["step"]["total"]["completed"] - 1


def _set_all_(counts: dict[str, int], value: int) -> None:
    counts.update(dict.fromkeys(counts, value))


def rewind_to_window_(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let a run resumed from this checkpoint go on at the first micro-batch of a window.

    For `LightningModule.on_save_checkpoint` under automatic optimization; `ResumableDataModule` does the same
    when it resumes a run.

    Args:
        checkpoint: as Lightning hands it over; its "loops" are edited.
        accumulate: micro-batches per optimizer step.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    put_(fit_loop, place_of(fit_loop, accumulate))
