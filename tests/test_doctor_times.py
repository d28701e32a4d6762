"""The doctor's times against known ones: a loader and a network that sleep."""

import time

import pytest
import torch
from small_module import module, network
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.analysis.step_times import (
    Kind,
    StepTimes,
    loading_time,
    network_time,
    step_time,
    workers,
)
from lightning_diffusion.analysis.trainer_settings import TrainerSettings

COMPUTE, LOAD, LATE = 0.2, 0.16, 0.1  # seconds a batch; by which a busy machine may be late


class SleepingNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network(0)

    def forward(self, x, c_noise):
        time.sleep(COMPUTE)
        return self.inner(x, c_noise)


class SleepingData(Dataset):
    def __init__(self, seconds, number):
        self.seconds, self.number = seconds, number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        time.sleep(self.seconds / 4)
        return torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index))


def patient(num_workers, seconds=LOAD, batches=20):
    loader = DataLoader(SleepingData(seconds, 4 * batches), 4, num_workers=num_workers)
    return Patient(module(network=SleepingNetwork()), loader, TrainerSettings({"max_steps": 9}), steps=3)


@pytest.mark.parametrize(("num_workers", "expected"), [(0, COMPUTE + LOAD), (1, COMPUTE)])
def test_loading_adds_to_the_step_unless_workers_do_it_meanwhile(num_workers, expected):
    one, kind = patient(num_workers), Kind("fp32")
    times = StepTimes(step_time(one, kind), network_time(one, kind), loading_time(one), workers(one))
    assert COMPUTE <= times.network < COMPUTE + LATE
    assert 0.9 * LOAD < times.loading < LOAD + LATE
    assert 0.95 * expected < times.whole < expected + LATE


def test_batches_that_workers_loaded_ahead_are_not_timed():
    slow = patient(2, seconds=0.4, batches=16)  # 0.2 s a batch from two workers, of four loaded ahead
    assert 0.16 < loading_time(slow) < 0.2 + LATE


def test_a_loader_that_workers_exhaust_ahead_is_timed_as_a_whole():
    assert loading_time(patient(2, seconds=0.1, batches=2)) >= 0.05
