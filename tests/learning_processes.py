"""AdaptiveDensity on two processes that each see half of the batch."""

from pathlib import Path

import torch
from test_adaptive_density import EDM, learned
from torch.testing import assert_close

import lightning_diffusion as ld


def main(_: Path) -> None:
    rank = torch.distributed.get_rank()
    mine = learned(ld.AdaptiveDensity(bins=8), EDM, steps=12, world_size=2, rank=rank).state_dict()
    both: list[dict] = [{}, {}]
    torch.distributed.all_gather_object(both, mine)
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][name], both[1][name]) for name in mine)
    alone = learned(ld.AdaptiveDensity(bins=8), EDM, steps=12).state_dict()
    assert_close(mine, alone, rtol=1e-5, atol=1e-5)
