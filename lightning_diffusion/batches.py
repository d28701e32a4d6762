"""From what a loader yields to images and conditions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_diffusion.noise_level import per_sample
from lightning_diffusion.resume import RandomKey

LABEL = "label"
CONTEXT = "context"


def unpack(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and conditions of a batch: x, (x, label) or {"image": x, "label": y, "context": c, ...}.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(batch, Tensor):
        return batch, {}
    if (
        isinstance(batch, (tuple, list))
        and len(batch) == 2
        and all(isinstance(part, Tensor) for part in batch)
    ):
        return batch[0], {LABEL: batch[1]}
    if isinstance(batch, Mapping) and isinstance(batch.get("image"), Tensor):
        return batch["image"], {name: part for name, part in batch.items() if name != "image"}
    raise TypeError(
        f"Found a batch of {_describe(batch)}; expected images, (images, labels), or "
        '{"image": images, "label": labels} as tensors.'
    )


class Repeatable(Iterable[Tensor]):
    """Tensors that `start()` yields, each time anew."""

    def __init__(self, start: Callable[[], Iterator[Tensor]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Tensor]:
        return self._start()


def every_sample(loader: Any) -> Iterator[Any]:
    """Batches of each sample of a loader's dataset once, in order, whatever the order of the loader.

    Raises:
        ValueError: if the loader does not deal out the whole dataset, each sample equally often.
    """
    sampler = getattr(loader, "sampler", None)
    whole = isinstance(sampler, (RandomSampler, SequentialSampler, DistributedSampler))
    if not whole or getattr(sampler, "replacement", False) or loader.batch_size is None:
        raise ValueError(
            f"Found a loader with {type(sampler).__name__}; expected one that deals out its whole dataset, each sample "
            "equally often, as reference_size takes all of it. Use StableTarget(extra=...), which needs only the batch."
        )
    return iter(DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn))


def declared_conditions(network: nn.Module) -> set[str]:
    """The conditions that a network takes: the keywords of its `forward` after x and c_noise."""
    parameters = list(inspect.signature(network.forward).parameters.values())[2:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {LABEL}
    return {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}


def drop_conditions(
    condition: Mapping[str, Tensor], null: int, share: float, key: RandomKey
) -> dict[str, Tensor]:
    """Replace labels (B,) by the null label and context (B, ...) by zeros, in a share of the samples, together.

    Drawn for the global batch; other conditions stay.
    """
    nulls = {name: value for name, value in {LABEL: null, CONTEXT: 0}.items() if name in condition}
    if not share or not nulls:
        return dict(condition)
    first = condition[next(iter(nulls))]
    drawn = key.uniform("label dropout", len(first)) < share
    dropped = drawn.to(first.device, non_blocking=True)
    changed = {
        n: condition[n].masked_fill(per_sample(dropped, condition[n]), null) for n, null in nulls.items()
    }
    return {**condition, **changed}


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict with the keys {sorted(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return (
            f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(part).__name__ for part in batch)})"
        )
    return type(batch).__name__
