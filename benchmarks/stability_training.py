"""Short trainings of every network at five sizes, with what grows in them: the trainings of stability.py.

logits       largest |q . k| / sqrt(head width) of each attention layer, of the training batch
activations  root mean square of what each block puts out
weights      root mean square of the matrices and kernels of each block
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from bfloat16_products import Bfloat16Products
from stability_networks import Run, data_of, network_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_diffusion as ld

WARMUP, RECORDS = 0.1, 10


@dataclass
class Trace:
    """Losses of all steps, and at some of them what `Recorder` finds."""

    losses: list[float] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def largest(self, name: str) -> float:
        """Over all records and layers; NaN without any."""
        return max((value for record in self.records for value in record[name]), default=math.nan)


class Recorder(TorchFunctionMode):
    """Attention logits and activations of the forwards inside it.

    Args:
        blocks: modules whose outputs are measured.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = blocks
        self.logits: list[float] = []
        self.activations: list[float] = []

    def __enter__(self) -> Recorder:
        self._hooks = [block.register_forward_hook(self._measure) for block in self.blocks]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _measure(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        self.activations.append(root_mean_square([output]))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = (part.detach().float() for part in args[:2])
            self.logits.append(((q @ k.mT).abs().max() / math.sqrt(q.shape[-1])).item())
        return func(*args, **(kwargs or {}))


def root_mean_square(tensors: Sequence[Tensor]) -> float:
    """Of all their elements together."""
    squares = sum(x.detach().float().square().sum().item() for x in tensors)
    return math.sqrt(squares / sum(x.numel() for x in tensors))


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The layers that a network is a row of."""
    if isinstance(network, ld.DiT):
        return list(network.blocks)
    if isinstance(network, ld.UNet):
        return [*network.down, network.middle, *network.up]
    if isinstance(network, ld.MagnitudePreservingUNet):
        return [*network.encoder, *network.decoder]
    raise TypeError(f"Found a {type(network).__name__}; expected a DiT, UNet or MagnitudePreservingUNet.")


def weights_of(block: nn.Module) -> float:
    """Root mean square of its matrices and kernels."""
    return root_mean_square([p for p in block.parameters() if p.ndim > 1])


@contextmanager
def products(run: Run) -> Iterator[None]:
    """Within: products as the run's precision has them."""
    if run.precision == "float32":
        yield
    else:
        with Bfloat16Products():
            yield


def train(run: Run) -> tuple[dict[str, Any], Trace]:
    """The row of a run, and its trace."""
    torch.manual_seed(run.seed)
    module = ld.DiffusionModule(network_of(run), ld.EDM())
    if run.precision == "bf16":
        ld.DiffusionPrecision("bf16-mixed").convert_module(module)
    start, trace = held_out_loss(module, run), Trace()
    optimizer = torch.optim.AdamW(module.parameters(), lr=run.rate, weight_decay=0.0, fused=True)
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.rate * min((step + 1) / (WARMUP * run.steps), 1)
        _step(module, run, step, trace)
        if not math.isfinite(trace.losses[-1]):
            break
        optimizer.step()
        optimizer.zero_grad()
    end = held_out_loss(module, run)
    return {
        "parameters": sum(p.numel() for p in module.network.parameters()),
        **figures(start, end, trace),
    }, trace


def _step(module: ld.DiffusionModule, run: Run, step: int, trace: Trace) -> None:
    """Loss and gradients of a batch."""
    x, labels, *_ = data_of(run.images)
    chosen = torch.randint(
        len(x), (run.batch,), generator=ld.RandomKey(run.seed, batch=step).generator("batch")
    )
    condition = {"label": labels[chosen]} if run.images == 8 else {}
    network = module.network
    recorder = Recorder(blocks_of(network))
    records = step % (run.steps // RECORDS) == 0 or step == run.steps - 1
    with products(run), recorder if records else torch.enable_grad():
        loss = module.objective.loss(network, x[chosen], condition, ld.RandomKey(run.seed, batch=step)).loss
    trace.losses.append(loss.item())
    if records:
        found = {"logits": recorder.logits, "activations": recorder.activations}
        weights = [weights_of(block) for block in blocks_of(network)]
        trace.records.append({"step": step, "loss": loss.item(), **found, "weights": weights})
    loss.backward()


@torch.no_grad()
def held_out_loss(module: ld.DiffusionModule, run: Run) -> float:
    """At the same levels and noise for all; 1 or so for an output of zero."""
    *_, x, labels = data_of(run.images)
    condition = {"label": labels} if run.images == 8 else {}
    module.eval()
    with products(run):
        loss = module.objective.loss(module.network, x, condition, ld.RandomKey(0, epoch=1)).loss
    module.train()
    return loss.item()


def diverged(start: float, end: float) -> bool:
    """Whether a training ended worse on held-out images than it began, or nowhere."""
    return not math.isfinite(end) or end > start


def figures(start: float, end: float, trace: Trace) -> dict[str, Any]:
    """What a row says of a training."""
    first, last = trace.records[0]["weights"], trace.records[-1]["weights"]
    return {
        "steps": len(trace.losses),
        "start": start,
        "end": end,
        "worst": max(trace.losses),
        "diverged": int(diverged(start, end)),
        "logit": trace.largest("logits"),
        "activation": trace.largest("activations"),
        "weight_growth": max(b / a for a, b in zip(first, last, strict=True)),
    }
