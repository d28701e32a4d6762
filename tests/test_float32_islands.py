"""Doors and islands: what they compute in, what follows them, and that they leave no trace."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.float32_islands import Precisions, find_islands


def test_an_exception_inside_of_an_island_gives_autocast_back():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("stop")

    net, in_place = nn.Sequential(Failing()), Precisions("cpu")
    in_place.open(net, torch.bfloat16)
    in_place.raise_(net[0])
    with pytest.raises(RuntimeError, match="stop"):
        net(torch.ones(2))
    assert not torch.is_autocast_enabled("cpu")


def small():
    """A network of two convolutions around a norm, in place under a door."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
    in_place = Precisions("cpu")
    in_place.open(net, torch.bfloat16)
    for island in find_islands(net, ["2"]).values():
        in_place.raise_(island)
    return net, in_place


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def test_copies_and_pickles_are_whole():
    net, _ = small()
    expected = net(X)
    copied = copy.deepcopy(net)
    assert_close(copied(X), expected, rtol=0, atol=0)
    nn.init.zeros_(copied[2].weight)
    nn.init.zeros_(copied[2].bias)
    assert not copied(X).any()
    assert_close(net(X), expected, rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    assert_close(torch.load(buffer, weights_only=False)(X), expected, rtol=0, atol=0)


def test_compiled_networks_follow_without_a_graph_break():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small()[0]

        def forward(self, x):
            return self.body(x) + 1

    low, plain = Net(), Net()
    plain.body = copy.deepcopy(small()[0])
    for part in plain.modules():
        part.__dict__.pop("forward", None)
    switching = copy.deepcopy(plain)
    expected = {True: low(X), False: plain(X)}
    assert not torch.equal(*expected.values())
    counter = CompileCounter()
    switching.compile(backend=counter, fullgraph=True)
    in_place = Precisions("cpu")
    for graphs, is_low in enumerate([False, True], 1):
        if is_low:
            in_place.open(switching.body, torch.bfloat16)
            in_place.raise_(switching.body[1])
            in_place.raise_(switching.body[2])
        assert_close(switching(X), expected[is_low], rtol=0, atol=0)
        assert counter.frame_count == graphs
    in_place.remove()
    assert_close(switching(X), expected[False], rtol=0, atol=0)


def test_checkpointed_activations_are_recomputed_alike():
    net, _ = small()
    plain = net(X)
    (gradient,) = torch.autograd.grad(plain.square().sum(), net[0].weight)
    again = torch.utils.checkpoint.checkpoint(net, X, use_reentrant=False)
    assert_close(torch.autograd.grad(again.square().sum(), net[0].weight)[0], gradient, rtol=0, atol=0)


def test_a_forward_that_was_replaced_before_comes_back():
    net, in_place = nn.Linear(2, 2), Precisions("cpu")
    net.forward = own = lambda x: x + 1
    in_place.raise_(net)
    assert net(torch.ones(2, dtype=torch.bfloat16)).dtype is torch.float32
    in_place.remove()
    assert net.forward is own


def test_lists_of_modules_stand_for_their_members_and_the_outermost_counts():
    net = ld.UNet((1, 8, 8), channels=16, num_blocks=1, attention_levels=(1,), num_classes=10)
    assert find_islands(net, ["down"]).keys() >= {"down.0", "down.1", "down.2", "middle.norm1", "noise"}
    assert not [name for name in find_islands(net, ["down"]) if name.startswith("down.0.")]
    assert "embedding" in find_islands(net, [])
