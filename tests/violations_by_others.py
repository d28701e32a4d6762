"""More violations, planted by someone who had not seen how the audit finds them; see planted_violations.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from planted_violations import BF16, CONVOLUTIONS, Planted, anonymous, between, hosted, tokens
from torch import nn


def root_mean_square(self, x):
    x = x.to(BF16)
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-4)


def capped_scores(self, x):
    q, k, v = self.qkv(tokens(x)).chunk(3, dim=-1)
    scores = 30 * torch.tanh(torch.baddbmm(self.bias, q, k.transpose(1, 2)) / 30)
    return x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


def capped_attention():
    made = anonymous(capped_scores, qkv=nn.Linear(8, 24))
    made.register_buffer("bias", torch.zeros(1, 1, 64, dtype=BF16))
    return made


def hand_written_softmax(self, x):
    q, k, v = self.qkv(tokens(x)).chunk(3, dim=-1)
    weights = (q @ k.mT).exp()
    return x + ((weights / weights.sum(-1, keepdim=True)) @ v).mT.reshape(x.shape)


def functional_layer_norm(self, x):
    return F.layer_norm(tokens(x).to(BF16), (8,)).mT.reshape(x.shape)


def outer_product(self, x):
    t = torch.linspace(0, 1000, len(x), dtype=BF16)
    phases = torch.outer(t, torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=BF16))
    return x + torch.cat([phases.cos(), phases.sin()], -1)[..., None, None]


def accumulated(self, x):
    return x + torch.cumsum(x.to(BF16).flatten(1), 1).view_as(x) / 512


def unit_length(self, x):
    return F.normalize(x.to(BF16), dim=1)


def whitened(self, x):
    x = x.to(BF16)
    return x / torch.sqrt(torch.var(x, (2, 3), keepdim=True) + 1e-3)


def log_sum(self, x):
    return x - torch.logsumexp(x.to(BF16), 1, keepdim=True)


def squared_error(self, batch, batch_idx):
    return F.mse_loss(self.net(batch), batch.to(BF16))


def huber(self, batch, batch_idx):
    return F.huber_loss(self.net(batch), batch.to(BF16))


OTHERS = [
    Planted("function", "net.1", between(anonymous(root_mean_square))),
    Planted("softmax", "net.1", between(capped_attention())),
    Planted("function", "net.1", between(anonymous(hand_written_softmax, qkv=nn.Linear(8, 24)))),
    Planted("normalisation", "net.1", between(anonymous(functional_layer_norm))),
    Planted("embedding", "net.1", between(anonymous(outer_product))),
    Planted("reduction", "net.1", between(anonymous(accumulated))),
    Planted("normalisation", "net.1", between(anonymous(unit_length))),
    Planted("normalisation", "net.1", between(anonymous(whitened))),
    Planted("function", "net.1", between(anonymous(log_sum))),
    Planted("loss", "", CONVOLUTIONS, lambda: "bf16-true", hosted(squared_error)),
    Planted("loss", "", CONVOLUTIONS, lambda: "bf16-true", hosted(huber)),
]
