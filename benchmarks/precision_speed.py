"""Is mixed precision faster here? Training steps of the shipped networks under each precision.

    python benchmarks/precision_speed.py [--rounds 10] [--limit 20] [--batch-size 16]

A step is loss, backward and AdamW(fused=True). All arms of a network take one step each per round, in changing order,
in one process. Median of a step's time and median of paired ratios of float32's to it (above 1: faster), with
quartiles. An arm whose second step takes longer than `limit` times float32's is measured no further.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from interleaved import Times, clocked, in_turns, spread
from torch import nn

from lightning_diffusion import (
    DiffusionModule,
    DiffusionPrecision,
    DiT,
    DiTSize,
    MagnitudePreservingUNet,
    UNet,
)

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


def training_step(network: nn.Module, batch: int, precision: str | None, layout: torch.memory_format) -> Step:
    """A training step of a network in some precision and layout."""
    module = DiffusionModule(network.to(memory_format=layout))  # type: ignore[call-overload]
    if precision:
        DiffusionPrecision(precision).convert_module(module)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, *network.image_shape).to(memory_format=layout)  # type: ignore[misc]

    def step() -> None:
        optimizer.zero_grad()
        module.objective.loss(module.network, images).loss.backward()
        optimizer.step()

    return step


def measure(make: Callable[[], nn.Module], rounds: int, limit: float, batch: int) -> Times:
    """Milliseconds of each arm's steps; of arms beyond the limit those of their second step alone."""
    arms = {name: clocked(training_step(make(), batch, *setting)) for name, setting in ARMS.items()}
    second = in_turns(arms, rounds=1, warm_up=1)
    slow = {name for name, t in second.items() if t[0] > limit * second["float32"][0]}
    times = in_turns({name: arm for name, arm in arms.items() if name not in slow}, rounds, warm_up=0)
    return {name: times.get(name, second[name]) for name in arms}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--limit", type=float, default=20.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args()
    print("| network | precision | ms per step | times as fast as float32 |\n|---|---|---|---|")
    for network in options.networks:
        times = measure(NETWORKS[network], options.rounds, options.limit, options.batch_size)
        for name, t in times.items():
            ratio = times["float32"] / t
            fast = spread(ratio, 2) if len(t) == options.rounds else f"{float(np.median(ratio)):.3f}, once"
            print(f"| {network} | {name} | {spread(t, 0)} | {fast} |", flush=True)


if __name__ == "__main__":
    main()
