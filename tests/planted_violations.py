"""Modules that compute in 16 bits what should be float32, in classes without names, and modules that only look so.

Add a planted violation to PLANTED: (what the audit has to call it, the module it has to name, how to make the network,
the precision to train in). A network takes and gives (B, 4, 8, 8); `None` names no module. Where more than the network
counts, `host` makes the LightningModule of the network. Add what must not be found to SAFE in the same form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

import lightning_diffusion as ld

BF16 = torch.bfloat16


def batches(count: int = 3) -> list[torch.Tensor]:
    """Images (B, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, 8, 8, generator=generator) for _ in range(count)]


class Host(L.LightningModule):
    """Trains `net` to give back its input; the loss is float32."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch).float(), batch.float())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def bf16_mixed() -> Any:
    return ld.DiffusionPrecision("bf16-mixed")


def float16_mixed() -> Any:
    return ld.DiffusionPrecision("16-mixed", loss_scaling=ld.LossScaling(start=2.0**10))


@dataclass(frozen=True)
class Planted:
    """See the module."""

    check: str
    module: str | None
    net: Callable[[], nn.Module]
    precision: Callable[[], Any] = bf16_mixed
    host: Callable[[nn.Module], L.LightningModule] = Host
    trainer: dict[str, Any] = field(default_factory=dict)


def anonymous(forward: Callable[..., Any], **parts: nn.Module) -> nn.Module:
    """A module of a class of its own, whose forward is forward(self, *inputs)."""
    made = type("_", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def between(part: nn.Module) -> Callable[[], nn.Module]:
    """A network of two convolutions around the part, which is called net.1."""
    return lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), part, nn.Conv2d(8, 4, 3, padding=1))


def hosted(training_step: Callable[..., Any], **methods: Any) -> Callable[[nn.Module], L.LightningModule]:
    """A LightningModule with another training step."""
    return lambda net: type("_", (Host,), {"training_step": training_step, **methods})(net)


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def softmax_attention(self, x):
    q, k, v = self.qkv(tokens(x)).chunk(3, dim=-1)
    return x + (F.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v).transpose(1, 2).reshape(x.shape)


def cross_attention(self, x):
    context = F.avg_pool2d(x, 2)
    scores = torch.einsum("bnc,bmc->bnm", self.q(tokens(x)), self.k(tokens(context)))
    weights = (scores.float() * 8**-0.5).softmax(-1)
    return x + (weights.to(x.dtype) @ tokens(context)).transpose(1, 2).reshape(x.shape)


def group_norm(self, x):
    return F.group_norm(x.bfloat16(), 2)


def hand_written_norm(self, x):
    x = x.bfloat16()
    return (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-3)


def own_running_statistics(self, x):
    with torch.no_grad():
        self.mean = 0.99 * self.mean + 0.01 * x.mean((0, 2, 3)).to(BF16)
    return x - self.mean[:, None, None]


def with_buffers(forward):
    made = anonymous(forward)
    made.register_buffer("mean", torch.zeros(8, dtype=BF16))
    made.register_buffer("variance", torch.ones(8, dtype=BF16))
    return made


def batch_norm(self, x):
    return F.batch_norm(x.bfloat16(), self.mean, self.variance, training=True)


def timesteps(self, x):
    t = torch.linspace(0, 999, len(x)).to(x)
    angles = t[:, None] * torch.logspace(0, -4, 4).to(x)
    return x + torch.cat([angles.sin(), angles.cos()], 1)[:, :, None, None]


def rounded_timesteps(self, x):
    t = torch.linspace(0, 999, len(x)).to(BF16).float()
    return x + (t[:, None] * torch.ones(8)).cos()[:, :, None, None]


def gates(self, x):
    return x * torch.exp(-x.bfloat16().abs())


def log_variance(self, x):
    return x / torch.log1p(x.bfloat16().abs() + 1)


def mean_pooled(self, x):
    return x - x.bfloat16().mean()


def enlarged(self, x):
    return x / x.abs().max() * 4e4


def tiny(self, x):
    return (x * 1e-9).half().float() * 1e9


def beyond(self, x):
    return (x.float() * 1e6).half().clamp(-1, 1)


def half_loss(self, batch, batch_idx):
    out = self.net(batch)
    return (out - batch.to(out.dtype)).abs().flatten(1).sum(1).float().mean()


def guided(self, batch, batch_idx):
    with torch.autocast("cpu", BF16):
        c, u = self.net(batch), self.net(batch * 0)
    return F.mse_loss((u + 3.0 * (c - u)).float(), batch)


def guided_in_one_batch(self, batch, batch_idx):
    with torch.autocast("cpu", BF16):
        c, u = self.net(torch.cat([batch, batch * 0])).chunk(2)
    return F.mse_loss((4.0 * c - 3.0 * u).float(), batch)


def decoding(self, batch, batch_idx):
    image = self.net[1](self.net[0](batch))
    return F.mse_loss(image.float(), F.interpolate(batch[:, :3], scale_factor=2.0))


def decoder():
    body = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(8, 3, 3, padding=1))
    return nn.Sequential(nn.Conv2d(4, 8, 1), anonymous(lambda self, x: self.body(x), body=body))


def own_clipping(self, optimizer):
    norm = sum(p.grad.pow(2).sum() for p in self.parameters()).sqrt()
    for p in self.parameters():
        p.grad.mul_((1 / (norm + 1e-6)).clamp(max=1.0))


@torch.library.custom_op("planted::scale", mutates_args=())
def scale(x: torch.Tensor) -> torch.Tensor:
    return x * 2


scale.register_autograd(lambda context, gradient: gradient * 2)


def within_linear(forward):
    """As `between`, with layers that are fast in float16 on a CPU."""
    return lambda: nn.Sequential(nn.Linear(8, 8), anonymous(forward), nn.Linear(8, 8))


CONVOLUTIONS = between(nn.SiLU())
CLIPPED = hosted(Host.training_step, on_before_optimizer_step=own_clipping)

PLANTED = [
    Planted("softmax", "net.1", between(anonymous(softmax_attention, qkv=nn.Linear(8, 24)))),
    Planted(
        "attention-scores", "net.1", between(anonymous(cross_attention, q=nn.Linear(8, 8), k=nn.Linear(8, 8)))
    ),
    Planted("normalisation", "net.1", between(anonymous(group_norm))),
    Planted("normalisation", "net.1", between(anonymous(hand_written_norm))),
    Planted("running-statistics", "net.1", between(with_buffers(batch_norm))),
    Planted("running-statistics", "net.1", between(with_buffers(own_running_statistics))),
    Planted("embedding", "net.1", between(anonymous(timesteps)), lambda: "bf16-true"),
    Planted("embedding", "net.1", between(anonymous(rounded_timesteps))),
    Planted("function", "net.1", between(anonymous(gates))),
    Planted("function", "net.1", between(anonymous(log_variance))),
    Planted("gate", "net.1", between(nn.Sigmoid())),
    Planted("reduction", "net.1", between(anonymous(mean_pooled))),
    Planted("loss", "", CONVOLUTIONS, host=hosted(half_loss)),
    Planted("gradient-norm", "", CONVOLUTIONS, lambda: "bf16-true", trainer={"gradient_clip_val": 1.0}),
    Planted("gradient-norm", "", CONVOLUTIONS, lambda: "bf16-true", CLIPPED),
    Planted("master-weights", "net.0", CONVOLUTIONS, lambda: ld.DiffusionPrecision("bf16-true")),
    Planted("optimizer-state", "net.0", CONVOLUTIONS, lambda: "bf16-true"),
    Planted("guidance", "", CONVOLUTIONS, host=hosted(guided)),
    Planted("guidance", "", CONVOLUTIONS, host=hosted(guided_in_one_batch)),
    Planted("decoder", "net.1", decoder, host=hosted(decoding)),
    Planted("near-limit", "net.1", within_linear(enlarged), float16_mixed),
    Planted("overflow", "net.1", within_linear(beyond), float16_mixed),
    Planted("underflow", "net.1", within_linear(tiny), float16_mixed),
    Planted("unknown-kernel", "net.1", between(anonymous(lambda self, x: torch.ops.planted.scale(x)))),
]


def float32_attention(self, x):
    q, k, v = self.qkv(tokens(x)).chunk(3, dim=-1)
    return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


def skip_and_resize(self, x):
    small = F.interpolate(F.avg_pool2d(F.gelu(x), 2), scale_factor=2.0, mode="bilinear")
    return F.dropout(x + small * torch.ones(8, 1, 1), 0.1)


def checkpointed(self, x):
    return torch.utils.checkpoint.checkpoint(self.norm, x, use_reentrant=False)


def squeeze_and_excite(self, x):
    return x * F.relu(self.gate(x.mean((2, 3), keepdim=True)))


def classified(self, batch, batch_idx):
    logits = self.net(batch).flatten(1)
    return F.cross_entropy(logits.float(), torch.zeros(len(batch), dtype=torch.int64))


SAFE = {
    "fused attention": Planted("", None, between(anonymous(float32_attention, qkv=nn.Linear(8, 24)))),
    "skips, dropout and interpolation": Planted("", None, between(anonymous(skip_and_resize))),
    "norms that are islands": Planted(
        "", None, between(nn.Sequential(nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.SiLU()))
    ),
    "mixed-type group norm of autocast": Planted("", None, between(nn.GroupNorm(2, 8)), lambda: "bf16-mixed"),
    "activation checkpointing": Planted("", None, between(anonymous(checkpointed, norm=nn.GroupNorm(2, 8)))),
    "a small mean": Planted("", None, between(anonymous(squeeze_and_excite, gate=nn.Conv2d(8, 8, 1)))),
    "logits of a classifier": Planted("", None, CONVOLUTIONS, host=hosted(classified)),
    "float16": Planted(
        "", None, lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), float16_mixed
    ),
    "float32": Planted(
        "", None, between(anonymous(softmax_attention, qkv=nn.Linear(8, 24))), lambda: "32-true"
    ),
}
