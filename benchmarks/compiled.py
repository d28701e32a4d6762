"""torch.compile with Inductor against eager, float32: the same numbers, and how fast? A U-Net and a DiT.

    python benchmarks/compiled.py [--rounds 40]

Numbers: outputs of a batch, and gradients of all parameters, zero-initialised weights set off zero; the largest
difference over the largest value, of the worst tensor. Speed: steps (loss, backward, AdamW) of both in turn, in an
order that alternates; median of the paired ratio, eager over compiled (above 1: faster), with quartiles.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
from clipping import spread
from torch import Tensor, nn

import lightning_diffusion as ld

BATCH, WARMUP = 64, 3
Step = Callable[[], None]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet, digits job": lambda: ld.UNet((1, 8, 8), 24, num_blocks=1, attention_levels=(), num_classes=10),
    "DiT, digits job": lambda: ld.DiT((1, 8, 8), 2, ld.DiTSize(64, 4, 4), 10),
}


def woken(network: nn.Module) -> nn.Module:
    """The network with every zero-initialised weight set off zero, as training would."""
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        if not p.any():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return network


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, 1, 8, 8, generator=generator)
    return x, torch.linspace(-1, 1, BATCH), torch.arange(BATCH) % 10


def results(network: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of a fixed sum of it."""
    output = network(*batch())
    network.zero_grad()
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return output.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference over the largest value, of the worst tensor."""
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def step_of(network: nn.Module) -> Step:
    objective, condition = ld.EDM(), {"label": batch()[2]}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        objective.loss(network, batch()[0], condition).loss.backward()
        optimizer.step()

    return step


def clocked(step: Step) -> float:
    began = perf_counter()
    step()
    return 1e3 * (perf_counter() - began)


def interleaved(eager: Step, compiled: Step, rounds: int) -> np.ndarray:
    """Milliseconds of each, (rounds, 2)."""
    times = []
    for number in range(rounds + WARMUP):
        if number % 2:
            times.append((clocked(eager), clocked(compiled)))
        else:
            times.append((clocked(compiled), clocked(eager))[::-1])
    return np.array(times[WARMUP:])


def row(name: str, rounds: int) -> str:
    torch.manual_seed(0)
    eager = woken(NETWORKS[name]())
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True)
    first = clocked(lambda: results(compiled)) / 1e3
    (output, gradients), (expected, expected_gradients) = results(compiled), results(eager)
    times = interleaved(step_of(eager), step_of(compiled), rounds)
    figures = [f"{difference([output], [expected]):.0e}", f"{difference(gradients, expected_gradients):.0e}"]
    speeds = [*(spread(times[:, i], 0) for i in (0, 1)), spread(times[:, 0] / times[:, 1], 2)]
    return f"| {' | '.join([name, *figures, *speeds, f'{first:.0f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(
        "| network | outputs differ | gradients | eager, ms | compiled, ms | times as fast | first call, s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in NETWORKS:
        print(row(name, rounds), flush=True)


if __name__ == "__main__":
    main()
