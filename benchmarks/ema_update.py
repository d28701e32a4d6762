"""What does an update of the average cost, beside other implementations?

    OMP_NUM_THREADS=1 python benchmarks/ema_update.py [--rounds 30] [--sizes small medium large]

All arms average the same U-Net in one process, one update each per round, in changing order; a figure is the
median over rounds, a ratio the median of paired ratios to one flat `lerp_` over the same number of bytes.

    flat lerp_       one tensor of all parameters: the limit of the memory
    ours             lightning_diffusion.averaging.Average, one width; two widths; every 8 steps, all steps counted
    torch            torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn
    lightning        EMAWeightAveraging's model: AveragedModel with get_ema_avg_fn and buffers
    ema-pytorch      EMA(update_every=1, use_foreach=True)
    diffusers        EMAModel(foreach=True)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from interleaved import Times, clocked, in_turns
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_diffusion import UNet
from lightning_diffusion.averaging import Average
from lightning_diffusion.profiles import PowerFunction

SIZES = {
    "small": {"channels": 44, "multipliers": [1, 2], "num_blocks": 1},
    "medium": {"channels": 84, "multipliers": [1, 2, 2], "num_blocks": 2},
    "large": {"channels": 208, "multipliers": [1, 2, 3], "num_blocks": 2},
}


def ours(network: nn.Module, *sigma_rels: float, every: int = 1) -> Callable[[], None]:
    """One optimizer step of our averages."""
    weights = [p.detach() for p in network.parameters()]
    averages = [Average(PowerFunction(s), [w.clone() for w in weights], weights, every) for s in sigma_rels]

    def step() -> None:
        for average in averages:
            average.before_step()
            average.after_step()

    return step


def eight_steps(step: Callable[[], None]) -> Callable[[], None]:
    """Eight steps, counted as one in the table: divide by eight for the amortised cost."""
    return lambda: [step() for _ in range(8)] and None


def arms(network: nn.Module) -> dict[str, Callable[[], object]]:
    """An update of every implementation that is installed."""
    flat = torch.cat([p.detach().flatten() for p in network.parameters()])
    shadow = flat.clone()
    multi = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    loop = AveragedModel(network, avg_fn=get_ema_avg_fn(0.999), use_buffers=True)
    found: dict[str, Callable[[], object]] = {
        "flat lerp_": lambda: shadow.lerp_(flat, 1e-3),
        "ours": ours(network, 0.1),
        "ours, two widths": ours(network, 0.05, 0.1),
        "ours, 8 steps at every 8": eight_steps(ours(network, 0.1, every=8)),
        "torch": lambda: multi.update_parameters(network),
        "lightning": lambda: loop.update_parameters(network),
    }
    if find_spec("ema_pytorch"):
        from ema_pytorch import EMA

        theirs = EMA(network, beta=0.999, update_every=1, update_after_step=0, use_foreach=True)
        found["ema-pytorch"] = theirs.update
    if find_spec("diffusers"):
        from diffusers.training_utils import EMAModel

        model = EMAModel(network.parameters(), decay=0.999, foreach=True)
        found["diffusers"] = lambda: model.step(network.parameters())
    return found


@torch.no_grad()
def measure(network: nn.Module, rounds: int) -> Times:
    """Milliseconds (rounds,) of every arm."""
    return in_turns({name: clocked(function) for name, function in arms(network).items()}, rounds)


def error_of_rare_updates(every: int, sigma_rel: float, steps: int = 10_000) -> float:
    """Of an average updated every so many steps, over |average - weights|, expected on a random walk.

    Weights that are one-hot in time turn averages into the shares that they give to each step.
    """
    shares = []
    for k in (1, every):
        weights = torch.zeros(steps + 1, dtype=torch.float64)
        share = weights.clone()
        average = Average(PowerFunction(sigma_rel), [share], [weights], k)
        for step in range(1, steps + 1):
            average.before_step()
            weights.zero_()[step] = 1
            average.after_step()
        shares.append(share.cumsum(0)[:-1])
    return float((shares[0] - shares[1]).norm() / shares[0].norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    for size in options.sizes:
        network = UNet([3, 32, 32], attention_levels=[1], **SIZES[size])
        count = sum(p.numel() for p in network.parameters()) / 1e6
        times = measure(network, options.rounds)
        print(f"\n{count:.1f} M parameters in {len(list(network.parameters()))} tensors")
        for name, t in times.items():
            ratio = np.median(t / times["flat lerp_"])
            low, high = np.percentile(t, [25, 75])
            print(f"  {name:26}{np.median(t):9.2f} ms  ({low:.2f} to {high:.2f}){ratio:8.2f} x flat lerp_")
        both = np.median(times["ours, two widths"] / times["ours"])
        print(f"  two widths over one: {both:.2f}")
    for sigma_rel in (0.05, 0.1):
        error = error_of_rare_updates(8, sigma_rel)
        print(f"every 8 steps, width {sigma_rel}, after 10,000: error {error:.1e} of |average - weights|")


if __name__ == "__main__":
    main()
