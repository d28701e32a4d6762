"""What does all that follows the backward pass cost: norm, check, clipping, AdamW, averages?

    OMP_NUM_THREADS=1 python benchmarks/step_tail.py [--rounds 30] [--sizes small medium large]

All arms take steps of the same U-Net with the same gradients in one process, one step each per round, in an order that
rotates; gradients are put back before, outside the clock, and half of the steps are over the clipping's bound. Median
over rounds, and median of paired ratios to ours, with quartiles.

    ours              one norm for check, sanitising and clipping; AdamW(fused=True); two averages
    lightning         what Trainer(gradient_clip_val=1.0), AdamW(p) and EMAWeightAveraging() run: one average
    lightning, fused  the same with AdamW(fused=True)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from itertools import cycle
from time import perf_counter

import numpy as np
import torch
from clipping import network, spread
from ema_update import SIZES
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_diffusion import GlobalNorm
from lightning_diffusion.averaging import Average
from lightning_diffusion.gradients import Gradients, sanitize_
from lightning_diffusion.profiles import PowerFunction

Step = Callable[[], object]


def ours(net: nn.Module) -> Step:
    """Two averages, and gradients that are not finite repaired."""
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    weights = [p.detach() for p in parameters]
    averages = [Average(PowerFunction(s), [w.clone() for w in weights], weights) for s in (0.05, 0.1)]
    clip = GlobalNorm(1.0)

    def step() -> None:
        gradients = Gradients([parameters])
        sanitize_(gradients)
        clip(gradients)
        for average in averages:
            average.before_step()
        optimizer.step()
        for average in averages:
            average.after_step()

    return step


def lightning(net: nn.Module, fused: bool | None = None) -> Step:
    """One average, no check."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=fused)
    average = AveragedModel(net, avg_fn=get_ema_avg_fn(0.999), use_buffers=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(net)

    return step


def gradients(net: nn.Module) -> list[list[Tensor]]:
    """Two sets for all parameters, of total norm 0.5 and 2."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(p.shape, generator=generator) for p in net.parameters()]
    total = float(nn.utils.get_total_norm(made))
    return [[g * (norm / total) for g in made] for norm in (0.5, 2.0)]


def measure(size: str, rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds (rounds,) of every arm, interleaved."""
    net = network(size)
    nets = [net, copy.deepcopy(net), copy.deepcopy(net)]
    makers = (ours, lightning, lambda n: lightning(n, fused=True))
    names = ("ours", "lightning", "lightning, fused")
    steps = {name: (n, make(n)) for name, n, make in zip(names, nets, makers, strict=True)}
    made, times, starts = gradients(net), {name: list[float]() for name in names}, cycle(range(len(names)))
    for number in range(rounds + 2):
        first = next(starts)
        for name in names[first:] + names[:first]:
            module, step = steps[name]
            for p, g in zip(module.parameters(), made[number % 2], strict=True):
                p.grad = g.clone()
            began = perf_counter()
            step()
            if number >= 2:
                times[name].append(1e3 * (perf_counter() - began))
    return {name: np.array(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    print("| parameters | | ms | times ours |\n|---|---|---|---|")
    for size in options.sizes:
        times = measure(size, options.rounds)
        count = sum(p.numel() for p in network(size).parameters()) / 1e6
        for name, t in times.items():
            print(f"| {count:.1f} M | {name} | {spread(t, 1)} | {spread(t / times['ours'], 2)} |", flush=True)


if __name__ == "__main__":
    main()
