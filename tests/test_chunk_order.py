"""The order of chunked samples: a permutation, the same for any number of readers, uniform, and near in the files."""

import pytest
import torch
from scipy import stats

from lightning_diffusion.chunk_order import ChunkOrder

CASES = [
    ([5, 7, 3], 4, 2),
    ([10] * 10, 3, 7),
    ([1], 4, 4),
    ([40] * 25, 8, 16),
    ([3, 0, 3], 6, 1),
    ([100], 7, 100),
    ([64] * 4, 16, 8),
]


@pytest.mark.parametrize(("sizes", "streams", "window"), CASES)
def test_every_sample_comes_once_whoever_reads(sizes, streams, window):
    order = ChunkOrder(sizes, streams, window, seed=1, epoch=2)
    whole = list(order.indices())
    assert sorted(whole) == list(range(sum(sizes)))
    for step in (1, 2, 3, 8):
        for first in (0, 1, step, 17, 400, 999, 5000):
            assert list(order.indices(first, step)) == whole[first::step]


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(**place):
        return list(ChunkOrder([40] * 25, 8, 16, **place).indices())

    assert order(seed=1, epoch=3) == order(seed=1, epoch=3)
    assert order(seed=1, epoch=3) != order(seed=1, epoch=4)
    assert order(seed=1, epoch=3) != order(seed=2, epoch=3)


def test_every_place_has_every_sample_equally_often():
    """Also the last places, which are dropped where batches do not divide; chi-square over 1,500 epochs."""
    sizes, epochs = [4, 4, 4, 1], 1500
    orders = torch.tensor([list(ChunkOrder(sizes, 3, 2, 0, epoch).indices()) for epoch in range(epochs)])
    for place in (0, 5, 11, 12):
        counts = torch.bincount(orders[:, place], minlength=13)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4, place


def test_a_process_reads_few_chunks_at_a_time_and_only_those_of_its_streams():
    """4 processes, 16 streams of 100 samples, windows of half a chunk: of each stream one chunk, at a boundary two."""
    sizes, streams, window = [25] * 64, 16, 12
    order = ChunkOrder(sizes, streams, window)
    touched = []
    for rank in range(4):
        mine = torch.tensor(list(order.indices(rank, 4))) // 25
        touched.append(len(mine.unique()))
        per_window = mine.split(window * streams // 4)
        assert max(len(part.unique()) for part in per_window) <= 2 * streams // 4
    assert max(touched) <= 64 // 4 + streams // 4


def test_a_batch_mixes_as_many_chunks_as_there_are_streams():
    order = ChunkOrder([100] * 32, streams=16, window=50)
    batches = torch.tensor(list(order.indices())).split(16)
    assert min(len((batch // 100).unique()) for batch in batches) >= 15


@pytest.mark.parametrize(("sizes", "streams", "window"), [([], 1, 1), ([0], 1, 1), ([3], 0, 1), ([3], 1, 0)])
def test_nothing_to_order_is_refused(sizes, streams, window):
    with pytest.raises(ValueError, match=r"samples, streams=.*expected at least 1 of each"):
        ChunkOrder(sizes, streams, window)
