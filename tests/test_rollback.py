"""A training put back to an earlier step goes on as it did then: bit for bit, in place, without sharing memory."""

from __future__ import annotations

import copy

import pytest
import torch
from guarded import assert_same
from torch import nn

from lightning_diffusion import TakenStepsLR
from lightning_diffusion.averager import ModelAverages
from lightning_diffusion.profiles import FixedDecay, PowerFunction
from lightning_diffusion.rollback import Buffers, Training, copy_training, restore_training_

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, fused=True),
    "tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon([w for w in p if w.ndim == 2], lr=0.01),
}


def made(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    profiles = {"a": FixedDecay(0.9), "b": PowerFunction(0.1)}
    averages = ModelAverages(profiles, dict(net.named_parameters()), [optimizer], every=2)
    averages.follow()
    return Training(net, [optimizer], [averages], [TakenStepsLR(optimizer, lambda step: 0.9**step)])


def step(training, number):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
    (optimizer,) = training.optimizers
    optimizer.zero_grad()
    training.module(x).square().mean().backward()
    optimizer.step()
    for scheduler in training.schedulers:
        scheduler.step()


def state(training):
    (optimizer,), (averages,) = training.optimizers, training.averages
    found = {"weights": training.module.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    found["rates"] = [group["lr"] for group in optimizer.param_groups]
    found["averages"] = {k: v for k, v in averages.state_dict().items() if k != "profiles"}
    return copy.deepcopy(found)


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_as_it_did(name, taken):
    training, reference = made(name), made(name)
    for number in range(taken):
        step(training, number)
        step(reference, number)
    saved = copy_training(training)
    for number in range(100, 103):
        step(training, number)
    restore_training_(training, saved)
    if (
        training.schedulers or taken
    ):  # a rate that is a tensor is not put back without a schedule, nor has it moved
        assert_same(state(training), state(reference))
    for number in range(20, 24):
        step(training, number)
        step(reference, number)
    assert_same(state(training), state(reference))
    restore_training_(training, saved)
    again = made(name)
    for number in range(taken):
        step(again, number)
    assert_same(state(training), state(again))


def test_copies_are_plain_data_that_a_checkpoint_takes(tmp_path):
    training = made("fused")
    step(training, 0)
    saved = copy_training(training)
    torch.save(saved, tmp_path / "saved.pt")
    assert_same(torch.load(tmp_path / "saved.pt", weights_only=True), saved)


def test_buffers_are_put_back_but_not_of_parts_that_do_not_train():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())
    buffers = Buffers(net)
    net(torch.randn(4, 2))
    buffers.keep()
    kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net(torch.full((4, 2), torch.nan))
    net[1].running_mean.fill_(7.0)
    assert net[0].running_mean.isnan().all()
    buffers.restore_()
    kept["1.running_mean"].fill_(7.0)
    assert_same(dict(net.named_buffers()), kept)
