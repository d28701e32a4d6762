"""How far generated samples are from real ones, as pure functions of feature arrays.

    real, generated    features of shape (N, F) and (M, F), tensors or arrays, one row per sample
    result             float64, shape ()

Everything is computed in float64. The features decide what a figure means: two figures compare only if the
same extractor and the same number of samples made them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_ROWS = 1024


class PrecisionRecall(NamedTuple):
    """Share of generated samples that lie among real ones, and of real ones among generated. Shape ()."""

    precision: Tensor
    recall: Tensor


def frechet_distance(real: Any, generated: Any) -> Tensor:
    r"""Squared Wasserstein-2 distance of the Gaussians with the same moments (Heusel et al. 2017, eq. 6).

    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^{1/2}), covariances with N - 1. Biased upwards by about a
    constant times 1/N + 1/M: compare at equal numbers. With N <= F a covariance is singular, which warns.
    """
    features = _features(real, generated)
    for name, x in zip(("real", "generated"), features, strict=True):
        _warn_if_singular(name, x)
    (mean_1, root_1), (mean_2, root_2) = (_mean_and_root(x) for x in features)
    cross: Tensor = torch.linalg.svdvals(root_1 @ root_2).sum()
    return (mean_1 - mean_2).square().sum() + root_1.square().sum() + root_2.square().sum() - 2 * cross


def kernel_distance(
    real: Any, generated: Any, *, subset_size: int | None = None, num_subsets: int = 100, seed: int = 0
) -> Tensor:
    """Unbiased squared maximum mean discrepancy, kernel (x.y/F + 1)^3 (Binkowski et al. 2018): KID.

    Unbiased at every N and M, so it may be slightly negative.

    Args:
        subset_size: mean over subsets of this size, drawn without replacement; None: all samples.
        num_subsets, seed: how many subsets, and which.
    """
    x, y = _features(real, generated)
    if subset_size is None:
        return _mmd(x, y)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"subset_size is {subset_size}, with {len(x)} real and {len(y)} generated samples. "
            f"Use 2 to {min(len(x), len(y))}, or None for all samples."
        )
    generator = torch.Generator().manual_seed(seed)
    draws = [
        _mmd(_subset(x, subset_size, generator), _subset(y, subset_size, generator))
        for _ in range(num_subsets)
    ]
    return torch.stack(draws).mean()


def precision_recall(real: Any, generated: Any, *, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2).

    A sample lies among others if it is at most as far from one of them as that one's k-th nearest neighbour.
    """
    x, y = _features(real, generated)
    if not 1 <= neighbours < min(len(x), len(y)):
        raise ValueError(
            f"neighbours is {neighbours}, with {len(x)} real and {len(y)} generated samples. "
            f"Use 1 to {min(len(x), len(y)) - 1}."
        )
    radius_x, radius_y = (_neighbour_distance(z, neighbours) for z in (x, y))
    return PrecisionRecall(precision=_share_within(y, x, radius_x), recall=_share_within(x, y, radius_y))


def near_copies(samples: Any, train: Any, *, quantile: float = 0.05) -> Tensor:
    """Share of samples closer to a training sample than training samples are to each other.

    Closer, that is, than the quantile of the distances from each training sample to its nearest other one.
    Fresh real samples score about `quantile`, a model that has memorised its data 1. Report it beside the
    share for held-out real samples.
    """
    x, y = _features(samples, train)
    bound = _neighbour_distance(y, 1).quantile(quantile)
    nearest = torch.cat([distance.amin(1) for distance in _distances(x, y)])
    return (nearest < bound).double().mean()


def _features(*arrays: Any) -> list[Tensor]:
    tensors = [torch.as_tensor(array).detach().to(torch.float64) for array in arrays]
    shapes = " and ".join(str(tuple(x.shape)) for x in tensors)
    if any(x.ndim != 2 for x in tensors) or len({x.shape[1] for x in tensors}) > 1:
        raise ValueError(
            f"Features have shapes {shapes}, expected (N, F) and (M, F). Use images.flatten(1), say."
        )
    if min(len(x) for x in tensors) < 2:
        raise ValueError(f"Features have shapes {shapes}: at least 2 samples are needed on either side.")
    if not all(x.isfinite().all() for x in tensors):
        bad = [int((~x.isfinite().all(1)).sum()) for x in tensors]
        raise ValueError(
            f"Features hold NaN or infinity in {bad[0]} and {bad[1]} rows. Mend the samples, or drop them."
        )
    return tensors


def _warn_if_singular(name: str, x: Tensor) -> None:
    if len(x) <= x.shape[1]:
        warnings.warn(
            f"{len(x)} {name} samples for {x.shape[1]} features: the covariance is singular and the Frechet "
            f"distance mostly bias. Use more than {x.shape[1]} samples, fewer features, or kernel_distance.",
            stacklevel=3,
        )


def _mean_and_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and symmetric root of the covariance."""
    values, vectors = torch.linalg.eigh(x.T.cov().reshape(x.shape[1], -1))
    return x.mean(0), vectors * values.clamp(min=0).sqrt() @ vectors.T


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    def mean_of_pairs(z: Tensor) -> Tensor:
        own = _kernel(z.square().sum(1) / z.shape[1]).sum()
        return (_kernel_sum(z, z) - own) / (len(z) * (len(z) - 1))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _kernel(product: Tensor) -> Tensor:
    return (product + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([_kernel(rows @ y.T / x.shape[1]).sum() for rows in _chunks(x)]).sum()


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(-(-len(x) // _CHUNK_ROWS))


def _subset(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=generator)[:size].to(x.device)]


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Distances from chunks of x to all of y; both are shifted by one mean, against cancellation."""
    centre = y.mean(0)
    for rows in _chunks(x):
        yield torch.cdist(rows - centre, y - centre)


def _neighbour_distance(x: Tensor, k: int) -> Tensor:
    """Distance from each sample to its k-th nearest other one, shape (N,)."""
    rows = torch.cat([distance.topk(k + 1, largest=False).values for distance in _distances(x, x)])
    return rows[:, k]


def _share_within(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.cat([(distance <= radius).any(1) for distance in _distances(x, y)]).double().mean()
