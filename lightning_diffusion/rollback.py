"""A training as it was some steps ago: weights, buffers, optimizers, averages, learning rates, loss scale.

Copies are plain data on the CPU, of local shards, and are put back in place, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_diffusion.averager import ModelAverages
from lightning_diffusion.averaging import local


class Training(NamedTuple):
    """What steps change. Schedulers and scaler: anything with a state dict."""

    module: nn.Module
    optimizers: Sequence[Optimizer]
    averages: Sequence[ModelAverages] = ()
    schedulers: Sequence[Any] = ()
    scaler: Any = None

    @property
    def parameters(self) -> Iterator[Tensor]:
        """Those that an optimizer holds."""
        return (p for o in self.optimizers for group in o.param_groups for p in group["params"])

    @property
    def sharded(self) -> bool:
        """Whether processes hold different parts."""
        return any(isinstance(p, DTensor) for p in self.parameters)


def copy_training(training: Training) -> dict[str, Any]:
    """All of it, as plain data that `restore_training_` takes."""
    return {
        "parameters": [_copy(p) for p in training.parameters],
        "buffers": {name: _copy(buffer) for name, buffer in training.module.named_buffers()},
        "optimizers": [_copy_optimizer(optimizer) for optimizer in training.optimizers],
        "averages": [_copy_averages(averages) for averages in training.averages],
        "rates": copy_rates(training),
        "scaler": copy.deepcopy(training.scaler.state_dict()) if training.scaler is not None else None,
    }


@torch.no_grad()
def restore_training_(training: Training, saved: Mapping[str, Any]) -> None:
    """Put everything back that was copied; what was added since stays as it is."""
    for p, old in zip(training.parameters, saved["parameters"], strict=False):
        local(p).copy_(old)
    for name, buffer in training.module.named_buffers():
        if name in saved["buffers"]:
            local(buffer).copy_(saved["buffers"][name])
    for optimizer, old in zip(training.optimizers, saved["optimizers"], strict=True):
        _restore_optimizer_(optimizer, old)
    for averages, old in zip(training.averages, saved["averages"], strict=True):
        _restore_averages_(averages, old)
    restore_rates_(training, saved["rates"])
    if training.scaler is not None:
        training.scaler.load_state_dict(copy.deepcopy(saved["scaler"]))


def copy_rates(training: Training) -> dict[str, Any]:
    """Learning-rate schedules, and the settings that they change; nothing where there are no schedulers."""
    groups = [_settings(optimizer) for optimizer in training.optimizers] if training.schedulers else []
    return {"schedulers": [copy.deepcopy(s.state_dict()) for s in training.schedulers], "groups": groups}


def restore_rates_(training: Training, saved: Mapping[str, Any]) -> None:
    """Put learning rates back, as if the steps since had not been."""
    for scheduler, old in zip(training.schedulers, saved["schedulers"], strict=True):
        scheduler.load_state_dict(copy.deepcopy(old))
    for optimizer, groups in zip(training.optimizers, saved["groups"], strict=False):
        for group, old in zip(optimizer.param_groups, groups, strict=False):
            _restore_(group, old, keep=("params",))


class Buffers:
    """A module's buffers before a step, in case that it is not taken; not of parts in evaluation mode.

    All are copied, for batch norm changes its statistics without telling autograd.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._kept: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Remember how they are now."""
        self._kept = {key: buffer.clone() for key, buffer in self._live().items()}

    @torch.no_grad()
    def restore_(self) -> None:
        """Put them back."""
        for key, buffer in self._live().items():
            if key in self._kept:
                buffer.copy_(self._kept[key])

    def _live(self) -> dict[tuple[str, str], Tensor]:
        training = ((name, module) for name, module in self.module.named_modules() if module.training)
        return {
            (name, key): local(buffer)
            for name, module in training
            for key, buffer in module.named_buffers(recurse=False)
        }


def _copy(x: Any) -> Any:
    return local(x).detach().to("cpu", copy=True) if isinstance(x, Tensor) else copy.deepcopy(x)


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{k: _copy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def _copy_optimizer(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """State by the parameter's place in the optimizer."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        i: {k: _copy(v) for k, v in optimizer.state[p].items()}
        for i, p in enumerate(held)
        if p in optimizer.state
    }


def _restore_optimizer_(optimizer: Optimizer, saved: Mapping[int, Mapping[str, Any]]) -> None:
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if i in saved:
            _restore_(optimizer.state[p], saved[i])
        else:
            optimizer.state.pop(p, None)


def _copy_averages(averages: ModelAverages) -> dict[str, Any]:
    weights = {name: {k: _copy(x) for k, x in average.items()} for name, average in averages.averages.items()}
    return {"weights": weights, "clocks": averages.clocks()}


def _restore_averages_(averages: ModelAverages, saved: Mapping[str, Any]) -> None:
    for name, average in saved["weights"].items():
        for key, old in average.items():
            local(averages.averages[name][key]).copy_(old)
    averages.set_clocks(saved["clocks"])


def _restore_(live: dict[str, Any], saved: Mapping[str, Any], keep: Sequence[str] = ()) -> None:
    for name in live.keys() - saved.keys() - set(keep):
        del live[name]
    for name, old in saved.items():
        if isinstance(old, Tensor) and isinstance(live.get(name), Tensor):
            local(live[name]).copy_(old)
        else:
            live[name] = copy.deepcopy(old)
