r"""Regress on the posterior mean over many clean samples instead of on the one that made x_t.

    w_i   = softmax_i( -|x_t - alpha x_i|^2 / (2 sigma^2) )        over references that hold the true x_0
    x_bar = sum_i w_i x_i,    eps_bar = (x_t - alpha x_bar) / sigma

The loss is minimised by E[x_0 | x_t], of which x_0 is a noisy sample and x_bar a better one (Xu, Tong & Jaakkola 2023).
If x_0 is one of exchangeable references, w is the exact posterior of which of them made x_t: the regression target
is unbiased for every number of references and never varies more. References without the true x_0 would bias it.

With r = alpha / sigma the exponent is, up to a constant, (r^2 x_0 + r eps) . x_i - r^2 |x_i|^2 / 2: one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_diffusion.batches import LABEL
from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.recording import Recorded

SAME = 1e-5
"""Two samples are one if |x_i - x_j|^2 is below this share of |x_i|^2 + |x_j|^2: float32 cannot tell them apart."""

LARGEST_RATIO = 1e4
"""Where alpha / sigma is more, x_0 itself is the target, as wherever no other sample has any weight."""


class References(NamedTuple):
    """Clean samples x0 (N, ...), their labels (N,) or None, and the label that stands for none."""

    x0: Tensor
    label: Tensor | None = None
    null: int | None = None

    def forbidden(self, label: Tensor | None) -> Tensor | None:
        """Which references (B, N) are of another condition than `label` (B,); None for none."""
        if label is None or self.label is None:
            return None
        other = label.int()[:, None] != self.label.int()
        return other if self.null is None else other & (label != self.null)[:, None]


class StableTarget(Recorded, nn.Module):
    """Which clean samples the regression target is averaged over, while training.

    With neither argument: the batch itself. Labelled samples are averaged within their class, those whose label
    was dropped over all. The cost per step is two matrix products of B x N x dimensions.

    Args:
        reference_size: training samples held on the device, encoded once when the fit starts: at least the whole
            training set, without augmentation. The target is then exact.
        extra: samples of each batch that serve as references only; the loss is of the others. For sets that do not
            fit: the loader's batch_size counts both.
        chunk: products of rows and references computed at once; bounds the memory.

    Raises:
        ValueError: if both or negative numbers are given; when used, if references lack the true x_0 or labels.
    """

    x0: Tensor | None
    label: Tensor | None

    def __init__(self, reference_size: int = 0, extra: int = 0, chunk: int = 2**24) -> None:
        super().__init__()
        if min(reference_size, extra) < 0 or (reference_size and extra) or chunk < 1:
            raise ValueError(
                f"Found reference_size={reference_size}, extra={extra}, chunk={chunk}; expected either a "
                "reference_size that holds the whole training set, or a number of extra samples per batch, not both."
            )
        self.reference_size, self.extra, self.chunk = reference_size, extra, chunk
        self.register_buffer("x0", None, persistent=False)
        self.register_buffer("label", None, persistent=False)

    @property
    def needs_references(self) -> bool:
        """Whether `remember` must see the training set first."""
        return self.reference_size > 0 and self.x0 is None

    def remember(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Hold the encoded training set as references: batches of x0 (B, ...) and labels (B,) or None."""
        x0s: list[Tensor] = []
        labels: list[Tensor] = []
        for x0, label in batches:
            x0s.append(x0)
            labels.extend([] if label is None else [label])
            _check_size(sum(map(len, x0s)), self.reference_size)
        self.x0 = torch.cat(x0s)
        self.label = torch.cat(labels).int() if labels else None

    def references(self, x0: Tensor, condition: Mapping[str, Tensor], null: int | None) -> References:
        """What a batch x0 (B, ...) is averaged over."""
        if unknown := set(condition) - {LABEL}:
            raise ValueError(
                f"StableTarget averages within labels, but the network is also conditioned on {sorted(unknown)}: "
                "samples of other conditions would be mixed. Train without stable_target."
            )
        if self.needs_references:
            raise ValueError(
                f"StableTarget(reference_size={self.reference_size}) has no references yet: outside of a "
                "DiffusionModule call remember([(x0, label)]) with the training set first."
            )
        if self.x0 is None:
            return References(x0, condition.get(LABEL), null)
        if LABEL in condition and self.label is None:
            raise ValueError(
                "The batch has labels, but the references have none: they would be mixed. Remember them with labels."
            )
        return References(self.x0.to(x0.dtype), self.label, null)

    def trained(self, x: Tensor) -> Tensor:
        """The samples of a batch x (B, ...) that the loss is of."""
        if self.extra >= len(x):
            raise ValueError(
                f"Found a batch of {len(x)} with StableTarget(extra={self.extra}); expected more samples than that: "
                "raise the loader's batch_size."
            )
        return x[: len(x) - self.extra]

    def check(self, x0: Tensor, label: Tensor | None) -> None:
        """Raise a ValueError if some of the batch x0 (B, ...) are not among the references of their label."""
        if self.x0 is None:
            return
        same = _same(x0.flatten(1), self.x0.to(x0).flatten(1))
        forbidden = References(self.x0, self.label).forbidden(label)
        if missing := int((~(same if forbidden is None else same & ~forbidden).any(1)).sum()):
            raise ValueError(
                f"Found {missing} of {len(x0)} training samples that are not among the references of StableTarget: "
                "averaging without the true x_0 biases the target. The data are augmented, encoded at random, or "
                "not those of the start: use StableTarget(extra=...), which needs only the batch."
            )

    def posterior(
        self, x0: Tensor, noise: Tensor, level: NoiseLevel, references: References, label: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The regression targets for x0 and noise (B, ...) at `level` under the labels (B,): (x_bar, eps_bar)."""
        rows = max(self.chunk // len(references.x0), 1)
        if rows >= len(x0):
            return _posterior(x0, noise, level, references, references.forbidden(label))
        labels = [None] * len(x0) if label is None else torch.split(label, rows)
        parts = (torch.split(part, rows) for part in (x0, noise, level.alpha, level.sigma))
        chunks = [
            _posterior(x, eps, NoiseLevel(alpha, sigma), references, references.forbidden(own))
            for x, eps, alpha, sigma, own in zip(*parts, labels, strict=False)
        ]
        x_bar, eps_bar = zip(*chunks, strict=True)
        return torch.cat(x_bar), torch.cat(eps_bar)


def _posterior(
    x0: Tensor, noise: Tensor, level: NoiseLevel, references: References, forbidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, eps, refs = x0.flatten(1), noise.flatten(1), references.x0.flatten(1)
    r = (level.alpha / level.sigma)[:, None]
    near = r.clamp(max=LARGEST_RATIO)
    with exact_products(x.device.type):
        logits = (near * (near * x + eps)) @ refs.T
        logits = logits.addcmul_(near**2, torch.linalg.vector_norm(refs, dim=1) ** 2, value=-0.5)
        logits = logits if forbidden is None else logits.masked_fill_(forbidden, -torch.inf)
        weights = logits.softmax(1)
        alone = (weights.amax(1, keepdim=True) == 1) | (r > LARGEST_RATIO)
        shift = (weights @ refs - x).masked_fill(alone, 0.0)
    return (x + shift).view_as(x0), (eps - near * shift).view_as(x0)


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Matrix products in the full precision of their operands: neither autocast nor TensorFloat-32."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def _same(x: Tensor, references: Tensor) -> Tensor:
    """Which of references (N, D) are the samples x (B, D), shape (B, N)."""
    sizes = x.square().sum(1, keepdim=True) + references.square().sum(1)
    with exact_products(x.device.type):
        return sizes - 2 * x @ references.T <= SAME * sizes


def _check_size(found: int, reference_size: int) -> None:
    if found > reference_size:
        raise ValueError(
            f"Found more than {reference_size} training samples, the reference_size of StableTarget: references "
            "that lack the true x_0 would bias the target. Raise reference_size to hold the whole training set, or "
            "use StableTarget(extra=...), which needs only the batch."
        )
