"""Running averages of a network's parameters that follow its optimizers.

An average moves when the optimizer that holds its parameters has really taken a step: not per micro-batch,
not where there were no gradients, and not where a gradient scaler skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_diffusion.averaging import Average, Averages
from lightning_diffusion.profiles import Profile
from lightning_diffusion.swapping import placed_like


class ModelAverages:
    """Averages under several profiles of the parameters that some optimizers move.

    Args:
        profiles: by the average's name.
        parameters: what to average, by name; those that no optimizer holds are left out.
        optimizers: each advances the averages of its own parameters.
        every: steps per update.
        start: steps before which an average is the weights of its last update.
    """

    def __init__(
        self,
        profiles: Mapping[str, Profile],
        parameters: Mapping[str, Tensor],
        optimizers: Sequence[Optimizer],
        every: int = 1,
        start: int = 0,
    ) -> None:
        groups = [_held_by(optimizer, parameters) for optimizer in optimizers]
        self.profiles, self.optimizers = dict(profiles), list(optimizers)
        self.parameters = {
            name: p for name, p in parameters.items() if any(name in group for group in groups)
        }
        self.averages: Averages = {name: _float_copies(self.parameters) for name in profiles}
        self.images, self.gathers = 0, True
        self._parts = [self._part(group, every, start) for group in groups]
        self._handles: list[RemovableHandle] = []

    def _part(self, group: Mapping[str, Tensor], every: int, start: int) -> dict[str, Average]:
        shadows = {name: [average[key] for key in group] for name, average in self.averages.items()}
        return {
            name: Average(profile, shadows[name], list(group.values()), every, start)
            for name, profile in self.profiles.items()
        }

    @property
    def moved(self) -> bool:
        """Whether any average was updated yet."""
        return any(a.steps >= a.every for part in self._parts for a in part.values())

    @property
    def steps(self) -> int:
        """Optimizer steps tried so far."""
        return max(average.steps for part in self._parts for average in part.values())

    def time(self, name: str) -> float:
        """Where an average's clock stands; its parameters have to be one optimizer's."""
        (average,) = [part[name] for part in self._parts if part[name].parameters]
        return average.elapsed - float(average.skipped)

    def left_out(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Names of parameters that an optimizer has begun to move since the averages were made."""
        moved = set().union(*(_held_by(optimizer, parameters) for optimizer in self.optimizers))
        return [name for name in parameters if name in moved and name not in self.parameters]

    def follow(self) -> None:
        """Move with every coming step of the optimizers."""
        for optimizer, part in zip(self.optimizers, self._parts, strict=True):
            averages = list(part.values())
            self._handles += [
                optimizer.register_step_pre_hook(lambda *_, averages=averages: self._before_step(averages)),
                optimizer.register_step_post_hook(
                    lambda o, *_, averages=averages: self._after_step(o, averages)
                ),
            ]

    def stop(self) -> None:
        """Stand still from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_step(self, averages: list[Average]) -> None:
        for average in averages:
            average.before_step()

    def _after_step(self, optimizer: Optimizer, averages: list[Average]) -> None:
        if _has_gradients(optimizer):
            for average in averages:
                average.after_step(self.images, getattr(optimizer, "found_inf", None))

    def clocks(self) -> dict[str, list[dict[str, Any]]]:
        """How far every average is, by its name, for each optimizer."""
        return {name: [part[name].state_dict() for part in self._parts] for name in self.profiles}

    def set_clocks(self, clocks: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Set all averages to where `clocks` found them."""
        for name in self.profiles:
            for part, clock in zip(self._parts, clocks[name], strict=True):
                part[name].load_state_dict(clock)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; sharded averages are gathered, so all processes have to call this.

        Under a strategy that writes shards (`gathers` is False) they are left as they are.
        """
        averages, given = self.averages.items(), whole if self.gathers else dict
        return {
            "averages": {name: given(average) for name, average in averages},
            "clocks": self.clocks(),
            "profiles": {name: repr(profile) for name, profile in self.profiles.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from a state; returns the names of averages that it does not hold, which begin anew."""
        for name in self.profiles.keys() & state["averages"].keys():
            self._load(name, state["averages"][name], state["clocks"].get(name, []))
        return [name for name in self.profiles if name not in state["averages"]]

    def _load(self, name: str, weights: Mapping[str, Tensor], clocks: Sequence[Mapping[str, Any]]) -> None:
        _check_same_parameters(name, weights, self.averages[name])
        own = self.averages[name]
        with torch.no_grad():
            for key, weight in weights.items():
                own[key].copy_(placed_like(weight, own[key]))
        for part, clock in zip(self._parts, clocks, strict=bool(clocks)):
            part[name].load_state_dict(clock)


def parameters_to_average(module: nn.Module, only: list[str] | None = None) -> dict[str, Tensor]:
    """Trainable parameters, or those of the module's `averaged_parameters()`, whose names fit a pattern."""
    choose = getattr(module, "averaged_parameters", None)
    named = choose() if choose else _trainable(module)
    patterns = ["*"] if only is None else only
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in named):
            raise ValueError(
                f"only={only!r}: no parameter is called {pattern!r}; the first of {len(named)} are "
                f"{list(named)[:3]}. Write a pattern such as 'generator.*'."
            )
    chosen = {name: p for name, p in named.items() if any(fnmatch(name, pattern) for pattern in patterns)}
    _refuse_sparse(chosen)
    return chosen


def state_of_weight_averaging(
    checkpoint: Mapping[str, Any], name: str, profile: Profile, parameters: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    """The average `name` from a checkpoint of Lightning's own WeightAveraging; None before its first update."""
    if int(checkpoint["averaging_state"]["n_averaged"]) == 0:
        return None
    step = checkpoint["global_step"]
    clock = {"steps": step, "elapsed": float(step), "stride": 1.0, "skipped": 0.0, "kept": 1.0, "block": None}
    return {
        "averages": {name: {key: checkpoint["state_dict"][key] for key in parameters}},
        "clocks": {name: [dict(clock) for _ in checkpoint["optimizer_states"]]},
        "profiles": {name: repr(profile)},
    }


def _trainable(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (parameter.is_floating_point() or parameter.is_complex())
    }


def _refuse_sparse(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if parameter.layout != torch.strided:
            raise ValueError(
                f"The parameter {name!r} has the layout {parameter.layout}; only dense ones can be averaged. "
                "Leave it out with `only=[...]`."
            )


def _held_by(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in parameters.items() if id(p) in held}


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _float_copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        return {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in parameters.items()
        }


def whole(average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: x.full_tensor().cpu() if isinstance(x, DTensor) else x.detach() for key, x in average.items()
    }


def _check_same_parameters(name: str, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    missing, strange = [k for k in own if k not in found], [k for k in found if k not in own]
    shapes = [
        f"{k} {tuple(found[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in found and found[k].shape != own[k].shape
    ]
    complaints = {"lacks": missing, "also has": strange, "has the shapes": shapes}
    said = ", ".join(f"{verb} {_few(keys)}" for verb, keys in complaints.items() if keys)
    if said:
        raise ValueError(
            f"The average {name!r} in the checkpoint does not fit the parameters to average: it {said}. "
            "Resume with the network and the `only` of that run, or begin anew after "
            '`del checkpoint["callbacks"]["EMA"]`.'
        )


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
