"""What does all that follows the backward pass cost: norm, check, clipping, AdamW, averages?

    OMP_NUM_THREADS=1 python benchmarks/step_tail.py [--rounds 30] [--sizes small medium large]

All arms take steps of the same U-Net with the same gradients in one process, one step each per round, in changing
order; gradients are put back before, outside the clock, and half of the steps are over the clipping's bound. Median
over rounds, and median of paired ratios to ours, with quartiles.

    ours              one norm for check, sanitising and clipping; AdamW(fused=True); two averages
    lightning         what Trainer(gradient_clip_val=1.0), AdamW(p) and EMAWeightAveraging() run: one average
    lightning, fused  the same with AdamW(fused=True)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from clipping import network
from ema_update import SIZES
from interleaved import Times, clocked, in_turns, spread
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


def measure(size: str, rounds: int) -> Times:
    """Milliseconds (rounds,) of every arm."""
    net = network(size)
    made = gradients(net)
    makers = {"ours": ours, "lightning": lightning, "lightning, fused": partial(lightning, fused=True)}
    nets = {name: copy.deepcopy(net) for name in makers}
    return in_turns(
        {name: clocked(make(nets[name]), put(nets[name], made)) for name, make in makers.items()}, rounds
    )


def put(net: nn.Module, sets: list[list[Tensor]]) -> Step:
    """Gives the network gradients, of the sets in turn."""
    turns = cycle(sets)

    def put_() -> None:
        for p, g in zip(net.parameters(), next(turns), strict=True):
            p.grad = g.clone()

    return put_


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
