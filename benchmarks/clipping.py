"""What does clipping cost, beside torch's clip_grad_norm_ and timm's adaptive_clip_grad?

    OMP_NUM_THREADS=1 python benchmarks/clipping.py [--rounds 30] [--sizes small medium large]

All arms clip the same gradients of one U-Net in one process, one call each per round, in changing order; gradients are
put back before every call, outside the clock. A figure is the median over rounds, a ratio the median of paired ratios
to clip_grad_norm_(foreach=True), both with quartiles. That one always multiplies everything, also where its norm is
within the bound; ours on the CPU only what is over its bound, so the share of units over it, the columns, matters.
`no branches` is the form for accelerators.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import torch
from ema_update import SIZES
from interleaved import Times, clocked, in_turns, spread
from torch import Tensor, nn

from lightning_diffusion import ClippingRule, GlobalNorm, UNet, scaling
from lightning_diffusion.gradients import Gradients, clip_adaptively_
from lightning_diffusion.norms import unit_norms

CLIP_FACTOR, SHARES = 0.01, (0.0, 0.1, 1.0)
Clip = Callable[[list[nn.Parameter]], object]


def network(size: str) -> UNet:
    """Nothing at zero, so that every unit has a length."""
    net = UNet([3, 32, 32], attention_levels=[1], **SIZES[size])
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.02, generator=generator)
    return net


@torch.no_grad()
def gradients(parameters: list[nn.Parameter], share: float) -> list[Tensor]:
    """Twice as long as adaptive clipping allows in a share of the units, half as long in the others."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(p.shape, generator=generator) for p in parameters]
    for p, g in zip(parameters, made, strict=True):
        weights, lengths = unit_norms([p], [g])
        over = torch.rand(weights.shape, generator=generator) < share
        factors = CLIP_FACTOR * weights.clamp(min=1e-3) / lengths * torch.where(over, 2.0, 0.5)
        g.mul_(factors.view(-1, *[1] * (g.ndim - 1)))
        p.grad = torch.empty_like(p)
    return made


@contextmanager
def no_branches() -> Iterator[None]:
    """As on an accelerator: nothing is looked at."""
    readable, scaling.readable = scaling.readable, lambda x: False
    try:
        yield
    finally:
        scaling.readable = readable


def without_branches(clip: Clip) -> Clip:
    def clip_(parameters: list[nn.Parameter]) -> None:
        with no_branches():
            clip(parameters)

    return clip_


def rule(make: Callable[[float], ClippingRule], bound: float) -> Clip:
    return lambda parameters: make(bound)(Gradients([parameters]))


def arms(norm: float) -> dict[str, Clip]:
    """What clips the gradients of this norm, wherever it is installed."""
    found: dict[str, Clip] = {
        "torch clip_grad_norm_": lambda p: nn.utils.clip_grad_norm_(p, norm / 2, foreach=True),
        "GlobalNorm, over its bound": rule(GlobalNorm, norm / 2),
        "GlobalNorm, within": rule(GlobalNorm, norm * 2),
        "GlobalNorm, no branches": without_branches(rule(GlobalNorm, norm / 2)),
        "Adaptive": lambda p: clip_adaptively_(p, CLIP_FACTOR),
        "Adaptive, no branches": without_branches(lambda p: clip_adaptively_(p, CLIP_FACTOR)),
    }
    if find_spec("timm"):
        from timm.utils.agc import adaptive_clip_grad

        found["timm adaptive_clip_grad"] = lambda p: adaptive_clip_grad(p, CLIP_FACTOR)
    return found


@torch.no_grad()
def measure(parameters: list[nn.Parameter], share: float, rounds: int) -> Times:
    """Milliseconds (rounds,) of every arm."""
    made = gradients(parameters, share)
    functions = arms(float(nn.utils.get_total_norm(made)))

    def put_back() -> None:
        torch._foreach_copy_([p.grad for p in parameters], made)

    return in_turns(
        {name: clocked(partial(f, parameters), put_back) for name, f in functions.items()}, rounds
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    for size in options.sizes:
        parameters = list(network(size).parameters())
        count = sum(p.numel() for p in parameters) / 1e6
        found = [measure(parameters, share, options.rounds) for share in SHARES]
        baseline = ", ".join(spread(times["torch clip_grad_norm_"], 1) for times in found)
        print(
            f"\n{count:.1f} M parameters, {torch.get_num_threads()} threads; clip_grad_norm_ takes {baseline} ms\n"
        )
        print("| times clip_grad_norm_ |", " | ".join(f"{share:.0%} over" for share in SHARES), "|")
        print("|---|---|---|---|")
        for name in found[0]:
            ratios = [spread(times[name] / times["torch clip_grad_norm_"], 2) for times in found]
            print(f"| {name} |", " | ".join(ratios), "|", flush=True)


if __name__ == "__main__":
    main()
