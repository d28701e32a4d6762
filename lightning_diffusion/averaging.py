r"""Running averages of weights.

    E <- beta E + (1 - beta) theta,   beta = profile.beta(t, dt)
    t    the clock after the step, in optimizer steps or images; dt the step's length on it
    k    an average moves once in k steps: beta is then the product of the k single ones

With k > 1 the mass 1 - beta of a block of steps is split over its ends, share c at its start theta_a and
1 - c at its end theta_t, so that the mean age of the weights is that of k = 1:

    E <- beta E + (1 - beta) (c theta_a + (1 - c) theta_t)

The start's part is added when the block begins, so no copy of theta_a is kept. Averages are at least float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_diffusion.profiles import Profile, Scalar
from lightning_diffusion.profiles import gamma_from_sigma_rel as gamma_from_sigma_rel
from lightning_diffusion.profiles import power_function_beta as power_function_beta

STATE_KEY = "EMA"

Averages = dict[str, dict[str, Tensor]]


class Block(NamedTuple):
    """What a block of steps keeps of the average, and which share of its own mass belongs at its start."""

    kept: float = 1.0
    share: float = 0.0

    @property
    def early(self) -> float:
        """Mass that is not at the block's end: kept + (1 - kept) share."""
        return self.kept + (1 - self.kept) * self.share


def plan_block(profile: Profile, t: float, steps: int, stride: float = 1.0) -> Block:
    """The block of `steps` steps of length `stride` that begins at t, with the mean age of single updates."""
    kept, age = 1.0, 0.0
    for step in range(1, steps + 1):
        beta = float(profile.beta(t + step * stride, stride))
        kept, age = kept * beta, beta * (age + 1 - kept)
    return Block(kept, age / ((1 - kept) * steps) if kept < 1 else 0.0)


def local(x: Tensor) -> Tensor:
    """This process's shard of a sharded tensor, or the tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


class Pairs(NamedTuple):
    """Averages and weights, local shards: those of one dtype apart from those that have to be converted."""

    averages: list[Tensor]
    weights: list[Tensor]
    converted: list[tuple[Tensor, Tensor]]


def pair(averages: Sequence[Tensor], weights: Sequence[Tensor]) -> Pairs:
    """Sort averages and the weights that belong to them."""
    pairs = [(local(a), local(w)) for a, w in zip(averages, weights, strict=True)]
    alike = [(a, w) for a, w in pairs if a.dtype == w.dtype]
    return Pairs([a for a, _ in alike], [w for _, w in alike], [p for p in pairs if p[0].dtype != p[1].dtype])


@torch.no_grad()
def lerp_(pairs: Pairs, share: Scalar) -> None:
    """averages += share (weights - averages), in place and without synchronisation."""
    for a, w in pairs.converted:
        a.lerp_(w.to(a.dtype), share if isinstance(share, float) else share.to(a.dtype))
    if pairs.averages and isinstance(share, float):
        torch._foreach_lerp_(pairs.averages, pairs.weights, share)
    elif pairs.averages:
        change = torch._foreach_sub(pairs.weights, pairs.averages)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(pairs.averages, change)


class Average:
    """One running average of parameters that one optimizer moves.

    Args:
        profile: how it weighs the past.
        shadows: the averages, changed in place.
        parameters: what is averaged, in the same order.
        every: steps per update.
        start: steps before which the average is the weights of its last update.
    """

    def __init__(
        self,
        profile: Profile,
        shadows: Sequence[Tensor],
        parameters: Sequence[Tensor],
        every: int = 1,
        start: int = 0,
    ) -> None:
        self.profile, self.shadows, self.parameters = profile, list(shadows), list(parameters)
        self.every, self.start = every, start
        sharded = any(isinstance(x, DTensor) for x in (*self.shadows, *self.parameters))
        self._pairs = None if sharded else pair(self.shadows, self.parameters)
        self.steps, self.elapsed, self.stride = 0, 0.0, 1.0
        self.skipped: Scalar = 0.0
        self.kept: Scalar = 1.0
        self.block: Block | None = None

    def before_step(self) -> None:
        """Begin a block: the part of its mass that belongs to the weights as they are now."""
        if self.every > 1 and self.block is None:
            self.block = block = self._plan()
            if block.share > 0:
                self._move((1 - block.kept) * block.share / block.early)

    def _move(self, share: Scalar) -> None:
        """Shards are looked up at every move, since FSDP may put others in their place."""
        lerp_(self._pairs or pair(self.shadows, self.parameters), share)

    def _plan(self) -> Block:
        if self.steps < self.start:
            return Block(kept=0.0)
        return plan_block(self.profile, self.elapsed, self.every, self.stride)

    def after_step(self, images: float = 1.0, found_inf: Tensor | None = None) -> None:
        """Count a step; `found_inf` (on the device) is 1 where a fused optimizer skipped it."""
        self.steps += 1
        self.kept = self.kept * self._beta(images, found_inf) if self.steps > self.start else 0.0
        if self.steps % self.every == 0:
            self._move(self._end_share())
            self.kept, self.block = 1.0, None

    def _beta(self, images: float, found_inf: Tensor | None) -> Scalar:
        self.stride = images if self.profile.clock == "images" else 1.0
        self.elapsed += self.stride
        if found_inf is None:
            return self.profile.beta(self.elapsed - self.skipped, self.stride)
        missed = found_inf.reshape(()).double() * self.stride
        beta = self.profile.beta(self.elapsed - self.skipped, self.stride - missed)
        self.skipped = self.skipped + missed
        return beta

    def _end_share(self) -> Scalar:
        block = self.block or Block()
        return 1 - (self.kept / block.kept if block.kept else 1.0) * block.early

    def state_dict(self) -> dict[str, Any]:
        """The clock; the averages themselves are saved by name."""
        numbers = {"steps": self.steps, "elapsed": self.elapsed, "stride": self.stride}
        return numbers | {
            "skipped": float(self.skipped),
            "kept": float(self.kept),
            "block": list(self.block) if self.block else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the clock."""
        self.steps, self.elapsed, self.stride = state["steps"], state["elapsed"], state["stride"]
        self.skipped, self.kept = state["skipped"], state["kept"]
        self.block = Block(*state["block"]) if state["block"] else None


def averages_in(checkpoint: Mapping[str, Any]) -> Averages:
    """The averages in a checkpoint, average name -> parameter name -> tensor; empty if it holds none.

    Found where the EMA callback keeps them, where a weights-only file has them ("averages"), and where
    Lightning's own WeightAveraging leaves its one.
    """
    if "averages" in checkpoint:
        return dict(checkpoint["averages"])
    if "averaging_state" in checkpoint and "current_model_state" in checkpoint:
        return {"ema": dict(checkpoint["state_dict"])}
    return dict(checkpoint.get("callbacks", {}).get(STATE_KEY, {}).get("averages", {}))


def resolve_weights(spec: str, averages: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Weights named `online | ema | ema:NAME | FILE.safetensors`, by parameter; None for the online ones.

    Args:
        spec: which weights; `ema` is the first average.
        averages: those that are at hand.
    """
    if spec == "online":
        return None
    if spec == "ema" or spec.startswith("ema:"):
        return _average_named(spec, averages)
    if spec.endswith(".safetensors"):
        return _weights_from_file(Path(spec))
    raise ValueError(
        f"Weights {spec!r} are not known: write online, ema, ema:NAME or the path of a .safetensors file."
    )


def full_name(spec: str, averages: Mapping[str, dict[str, Tensor]]) -> str:
    """The name that says which average is meant: `ema` is `ema:NAME` of the first, unless that is called so."""
    first = next(iter(averages), "ema")
    return f"ema:{first}" if spec == "ema" != first else spec


def _average_named(spec: str, averages: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    if not averages:
        raise ValueError(
            f"Weights {spec!r} were asked for, but there are no averages here: the network was trained "
            "without the EMA callback, or the file left them out. Write online for the weights as they are."
        )
    name = spec.removeprefix("ema").removeprefix(":") or next(iter(averages))
    if name not in averages:
        near = get_close_matches(name, averages, n=1)
        hint = f" Did you mean ema:{near[0]}?" if near else ""
        known = ", ".join(map(repr, averages))
        raise ValueError(f"There is no average {name!r}, only {known}; ema alone takes the first.{hint}")
    return averages[name]


def _weights_from_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"Weights file {str(path)!r} does not exist; expected a file of tensors by parameter name."
        )
    from safetensors.torch import load_file

    return load_file(path)


def load_averaged(path: str | Path, name: str | None = None) -> dict[str, Tensor]:
    """State dict of a checkpoint's LightningModule with averaged instead of online weights.

    Args:
        path: a checkpoint file, or the folder of a sharded one.
        name: which average; the first if not given.
    """
    file = Path(path) / "meta.pt" if Path(path).is_dir() else Path(path)
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    averaged = _average_named(f"ema:{name or ''}", averages_in(checkpoint))
    return overlay(checkpoint.get("state_dict", {}), averaged)


def overlay(state_dict: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put `weights` into a state dict, under every name that a shared tensor has there, in the old dtype."""
    by_place = {_place(state_dict[name]): weights[name] for name in weights if name in state_dict}
    replaced = {
        name: by_place[_place(old)].to(old.dtype)
        for name, old in state_dict.items()
        if _place(old) in by_place
    }
    return {**state_dict, **{name: weights[name] for name in weights if name not in state_dict}, **replaced}


def _place(x: Tensor) -> tuple[object, ...]:
    storage = local(x)
    return (storage.data_ptr() or id(x), *storage.shape, *storage.stride())
