"""What makes a stopped run go on exactly where it stopped.

Every random number of a training step is a function of (seed, purpose, epoch, micro-batch index), never of
what was drawn before: nothing about random numbers has to be saved. Draws that must not depend on the number
of processes (noise levels, label drops, augmentation) are made for the global batch and sliced by rank; sample
j on rank r is number j * world_size + r of the global batch, which is how `ResumableSampler` deals them out.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor


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
        return draws[self.rank :: self.world_size]

    def stratified_uniform(self, purpose: str, batch: int) -> Tensor:
        """Like `uniform`, with one draw in each of n equal strata of [0, 1), n the samples of an optimizer step.

        Sample g of the global batch, in micro-batch a of the step, takes stratum (g A + a + S) mod n; the shift S
        is drawn once per step, so that no place in the batch keeps its stratum and each u is exactly uniform.
        """
        samples = batch * self.world_size
        n, window = samples * self.accumulate, self.batch // self.accumulate
        shift_seed = hash_seed(self.seed, purpose, "shift", self.epoch, window)
        shift = torch.randint(n, (), generator=torch.Generator().manual_seed(shift_seed))
        place = torch.arange(self.rank, samples, self.world_size) * self.accumulate
        stratum = (place + self.batch % self.accumulate + shift) % n
        return (stratum + self.uniform(purpose, batch)) / n
