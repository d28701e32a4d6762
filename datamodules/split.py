"""A held-out part that is the same on every machine, and nearly the same when data are added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from lightning_diffusion.resume import hash_seed


def held_out(names: Sequence[str], classes: Sequence[Hashable], fraction: float) -> list[bool]:
    """Which samples are held out: of each class the `fraction` whose names have the smallest hashes.

    Args:
        names: of the samples, all different; they alone decide.
        classes: of the samples.
        fraction: 0 <= fraction < 1; of each class that share is held out, rounded down.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"found held_out={fraction}, expected a share from 0 (none) to below 1.")
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index in sorted(range(len(names)), key=lambda i: hash_seed("held out", names[i])):
        members[classes[index]].append(index)
    chosen = {i for group in members.values() for i in group[: int(fraction * len(group))]}
    return [i in chosen for i in range(len(names))]
