"""Run by torchrun on two processes: a guard that sees disjoint data decides the same on both."""

from __future__ import annotations

from pathlib import Path

from guarded import EAGER, Poison, Regression, assert_same, batches, everything, spoilt, train
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_diffusion.callbacks import EMA, SpikeGuard
from lightning_diffusion.spikes import Action

TWO = {"devices": 2, "use_distributed_sampler": False}


def ddp() -> dict[str, object]:
    return {"strategy": DDPStrategy(process_group_backend="gloo"), **TWO}


def fsdp() -> dict[str, object]:
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    return {"strategy": ModelParallelStrategy(**sizes, process_group_backend="gloo"), **TWO}


class Sharded(Regression):
    """Eight rows on two processes."""

    def configure_model(self) -> None:
        if not isinstance(self.body[0].weight, DTensor):
            fully_shard(self.body, mesh=self.device_mesh["data_parallel"])


def over_processes(own: object) -> list[object]:
    found: list[object] = [None, None]
    distributed.all_gather_object(found, own)
    return found


def check(make, options, rank: int) -> None:
    """One process alone has a bad sample; both have bad weights later."""
    own = batches(60, seed=rank)
    guard, expected_guard = SpikeGuard(EAGER, None, 10), SpikeGuard(EAGER, None, 10)
    data = spoilt(own, 15, by=1e6) if rank == 0 else spoilt(own, 20)
    found = everything(train(make(), data, guard, EMA(0.9), Poison(44), **options()))
    rest = [batch for i, batch in enumerate(own[:30] + own[47:]) if i not in (15, 20)]
    expected = everything(train(make(), rest, expected_guard, EMA(0.9), **options()))
    assert_same(local(found), local(expected))
    steps = [(event.step, event.action, event.to_step) for event in guard.events]
    skipped = [(step, Action.SKIP, None) for step in (15, 20, 44, 45)]
    assert steps == [*skipped, (46, Action.ROLL_BACK, 30)], steps
    assert expected_guard.events == []
    ours, theirs = over_processes([event.state_dict() for event in guard.events])
    assert str(ours) == str(theirs)
    assert guard.events[0].indices == (*range(240, 256), *range(240, 256))


def local(state: object) -> object:
    """This process's shards."""
    if isinstance(state, dict):
        return {key: local(value) for key, value in state.items()}
    if isinstance(state, list):
        return [local(value) for value in state]
    return state.to_local() if isinstance(state, DTensor) else state


def main(_: Path) -> None:
    rank = distributed.get_rank()
    check(Regression, ddp, rank)
    check(Sharded, fsdp, rank)
