"""Is mixed precision faster here? Training steps of the shipped networks under each precision.

    python benchmarks/precision_speed.py [--rounds 10] [--limit 20]

A step is loss, backward and AdamW(fused=True). All arms of a network take one step each per round, in an order that
rotates, in one process. Median of a step's time and median of paired ratios of float32's to it (above 1: faster), with
quartiles. An arm whose first step takes longer than `limit` times float32's is measured no further.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle
from time import perf_counter

import numpy as np
import torch
from clipping import spread
from torch import nn

from lightning_diffusion import (
    DiffusionModule,
    DiffusionPrecision,
    DiT,
    DiTSize,
    MagnitudePreservingUNet,
    UNet,
)

BATCH = 16
Step = Callable[[], None]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet, digits job, 8 x 8": lambda: UNet((1, 8, 8), 24, num_blocks=1, attention_levels=(), num_classes=10),
    "UNet, 32 x 32": lambda: UNet((3, 32, 32), 64, (1, 2, 2), attention_levels=(1,)),
    "MagnitudePreservingUNet, 32 x 32": lambda: MagnitudePreservingUNet((3, 32, 32), 48, (1, 2), 2, (1,)),
    "DiT, patches of 4, 32 x 32": lambda: DiT((3, 32, 32), 4, DiTSize(192, 6, 3)),
}
ARMS = {
    "float32": (None, torch.contiguous_format),
    "float32, channels last": (None, torch.channels_last),
    "bf16-mixed": ("bf16-mixed", torch.contiguous_format),
    "bf16-mixed, channels last": ("bf16-mixed", torch.channels_last),
    "bf16-true": ("bf16-true", torch.contiguous_format),
}


def arm(network: nn.Module, precision: str | None, layout: torch.memory_format) -> Step:
    """A training step of a network in some precision and layout."""
    module = DiffusionModule(network.to(memory_format=layout))  # type: ignore[call-overload]
    if precision:
        DiffusionPrecision(precision).convert_module(module)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    images = torch.randn(BATCH, *network.image_shape).to(memory_format=layout)  # type: ignore[misc]

    def step() -> None:
        optimizer.zero_grad()
        module.objective.loss(module.network, images).loss.backward()
        optimizer.step()

    return step


def clocked(step: Step) -> float:
    began = perf_counter()
    step()
    return 1e3 * (perf_counter() - began)


def measure(make: Callable[[], nn.Module], rounds: int, limit: float) -> dict[str, np.ndarray]:
    """Milliseconds of each arm's steps, interleaved; of arms beyond the limit of their first step alone."""
    steps = {name: arm(make(), *setting) for name, setting in ARMS.items()}
    first = {name: clocked(step) for name, step in steps.items()}
    slow = {name: np.array([t]) for name, t in first.items() if t > limit * first["float32"]}
    names = [name for name in steps if name not in slow]
    times, starts = {name: list[float]() for name in names}, cycle(range(len(names)))
    for number in range(rounds + 1):
        start = next(starts)
        for name in names[start:] + names[:start]:
            t = clocked(steps[name])
            if number:
                times[name].append(t)
    return {name: slow[name] if name in slow else np.array(times[name]) for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--limit", type=float, default=20.0)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args()
    print("| network | precision | ms per step | times as fast as float32 |\n|---|---|---|---|")
    for network in options.networks:
        times = measure(NETWORKS[network], options.rounds, options.limit)
        for name, t in times.items():
            fast = spread(times["float32"] / t, 2) if len(t) > 1 else f"below {1 / options.limit}"
            print(f"| {network} | {name} | {spread(t, 0)} | {fast} |", flush=True)


if __name__ == "__main__":
    main()
