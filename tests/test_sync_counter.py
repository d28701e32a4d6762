"""The counter notices every way of waiting for the device, and nothing else."""

from __future__ import annotations

import pytest
import torch
from sync_counter import SyncCounter
from torch import nn

from lightning_diffusion.averaging import Average
from lightning_diffusion.profiles import Profile

WAITS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "print": lambda x: repr(x),
    "format": lambda x: f"{x[0]:.3f}",
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_every_way_of_waiting_is_noticed(wait):
    x = torch.arange(-2.0, 3.0)
    with SyncCounter() as counter:
        wait(x)
    assert counter.calls
    assert not counter.ours


def test_a_training_step_by_itself_does_not_wait():
    net = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    with SyncCounter() as counter:
        net(torch.randn(2, 3)).square().mean().backward()
        optimizer.step()
    assert not counter.calls


def test_waiting_inside_the_package_is_called_ours():
    class Waiting(Profile):
        def beta(self, t, dt):
            return float(torch.tensor(0.5))

    with SyncCounter() as counter:
        Average(Waiting(), [torch.zeros(2)], [torch.ones(2)]).after_step()
    assert len(counter.ours) == 1
    assert "averaging.py" in counter.ours[0]
