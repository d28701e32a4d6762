"""In which order the samples of a dataset in chunks are read: shuffled, yet few chunks at a time.

The chunks of an epoch, in a drawn order, are laid out as a circle that begins at a drawn sample and is cut into S equal
streams. The samples of a stream are shuffled within windows of W, and the streams take turns: place g of the epoch is
of stream g mod S. So

- every sample comes exactly once per epoch, at every place with the same probability;
- the order is a function of (seed, epoch) alone, not of the number of processes or workers;
- R processes that take places r, r + R, ... each read whole streams, S / R of them, if R divides S, and of each only
  about 1 + W / (samples per chunk) chunks at a time: others need not be downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_diffusion.resume import hash_seed


class ChunkOrder:
    """The order of one epoch.

    Args:
        sizes: samples of each chunk.
        streams: S, how many chunks at least are mixed; best a multiple of the number of processes.
        window: W, samples of a stream that are shuffled together.
        seed, epoch: what the order is a function of.

    Raises:
        ValueError: without samples, streams or window.
    """

    def __init__(
        self, sizes: Sequence[int], streams: int = 64, window: int = 4096, seed: int = 0, epoch: int = 0
    ) -> None:
        if sum(sizes) < 1 or min(streams, window) < 1:
            raise ValueError(
                f"Found {sum(sizes)} samples, streams={streams}, window={window}; expected at least 1 of each."
            )
        self.total, self.window, self.seed, self.epoch = sum(sizes), window, seed, epoch
        self.streams = min(streams, self.total)
        self._sizes = torch.tensor(sizes, dtype=torch.int64)

    def indices(self, first: int = 0, step: int = 1) -> Iterator[int]:
        """Indices of the samples at places first, first + step, ..., without computing those before."""
        per_block = self.streams * self.window
        for block in range(first // per_block, -(-self.total // per_block)):
            places = self.block(block)
            begin = block * per_block
            skipped = first - begin if begin <= first else (first - begin) % step
            yield from places[skipped::step].tolist()

    def block(self, number: int) -> Tensor:
        """Indices at places n S W, ..., n S W + S W - 1, or fewer at the end, shape (P,)."""
        rows, left = divmod(self.total, self.streams)
        first, last = number * self.window, min((number + 1) * self.window, rows)
        generator = self._generator("window", number)
        drawn = [torch.randperm(last - first, generator=generator) for _ in range(self.streams)]
        inside = self._starts + first + torch.stack(drawn, 1)
        tail = self._starts[:left] + rows
        within = number == (self.total - 1) // (self.streams * self.window)
        return self._sample(torch.cat([inside.flatten(), tail]) if within else inside.flatten())

    @cached_property
    def _starts(self) -> Tensor:
        """Where each stream begins on the circle, shape (S,)."""
        rows, left = divmod(self.total, self.streams)
        stream = torch.arange(self.streams)
        return stream * rows + stream.clamp(max=left)

    @cached_property
    def _layout(self) -> tuple[Tensor, Tensor, int]:
        """Where each chunk of the circle ends, what to add there to come to a sample's index, where it begins."""
        generator = self._generator("chunks", 0)
        order = torch.randperm(len(self._sizes), generator=generator)
        begin = int(torch.randint(self.total, (), generator=generator))
        ends = self._sizes[order].cumsum(0)
        first = (self._sizes.cumsum(0) - self._sizes)[order]
        return ends, first - (ends - self._sizes[order]), begin

    def _sample(self, place: Tensor) -> Tensor:
        ends, offset, begin = self._layout
        place = (place + begin) % self.total
        return place + offset[torch.searchsorted(ends, place, right=True)]

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash_seed(self.seed, "order", purpose, self.epoch, number))


def sample_of_few_chunks(sizes: Sequence[int], number: int, at_least: int = 64) -> Tensor:
    """A fixed random choice of samples out of few chunks, sorted, shape (number,).

    Args:
        sizes: samples of each chunk.
        number: how many, of all at most.
        at_least: chunks to choose from, the first in a fixed random order; of more, if these hold too few.
    """
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor(sizes, dtype=torch.int64)
    order = torch.randperm(len(size), generator=generator)
    needed = int(torch.searchsorted(size[order].cumsum(0), number)) + 1
    first = size.cumsum(0) - size
    candidates = [torch.arange(sizes[n]) + first[n] for n in order[: max(at_least, needed)].tolist()]
    samples = torch.cat(candidates)
    return samples[torch.randperm(len(samples), generator=generator)[:number]].sort().values
