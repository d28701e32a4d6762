r"""Means and their standard errors over a stream of samples.

    values    float64, one row per sample, one column per quantity      shape (B, M)
    mean      over all samples                                          shape (M,)
    covariance    of the mean, scatter / (n (n - 1))                    shape (M, M)

The samples are taken to be independent; the columns are not, so that the error of a sum over columns (an integral over
noise levels, say) is that of the samples' own sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diffusion.analysis.information import Estimate

_SAMPLES_PER_CONTROL = 20  # from which on a control's coefficient costs less than it gains


class Moments(NamedTuple):
    """Means (M,) and their covariance (M, M), of n samples."""

    mean: Tensor
    covariance: Tensor
    samples: int

    @property
    def estimate(self) -> Estimate:
        """The means with their standard errors, both of shape (M,)."""
        return Estimate(self.mean, self.covariance.diagonal().clamp(min=0).sqrt())

    def linear(self, matrix: Tensor, offset: Tensor | float = 0.0) -> Moments:
        """Of matrix @ values + offset; matrix (R, M), offset (R,)."""
        return Moments(matrix @ self.mean + offset, matrix @ self.covariance @ matrix.T, self.samples)

    def controlled(self, controls: int) -> Moments:
        """Of all but the last columns, whose mean is known to be 0: their share in the others' chance is taken out.

        Control variates with fitted coefficients: biased by O(1/n), less than the standard error by far. With few
        samples the controls are left out.
        """
        kept = len(self.mean) - controls
        own, across = self.covariance[kept:, kept:], self.covariance[:kept, kept:]
        enough = self.samples >= _SAMPLES_PER_CONTROL * controls
        gain = across @ torch.linalg.pinv(own, hermitian=True) if enough else torch.zeros_like(across)
        return self.linear(torch.cat([torch.eye(kept, dtype=self.mean.dtype), -gain], 1))


def moments(stream: Iterable[Tensor]) -> Moments:
    """Of rows (B, M), in one pass (Chan et al. 1983), in memory that does not grow with their number.

    Raises:
        ValueError: for fewer than two rows.
    """
    count, mean, scatter = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for rows in stream:
        n, own = len(rows), rows.mean(0)
        shift, total = own - mean, count + n
        scatter = scatter + (rows - own).T @ (rows - own) + shift.outer(shift) * (count * n / total)
        count, mean = total, mean + shift * (n / total)
    if count < 2:
        raise ValueError(f"Found {count} samples; expected at least two, which a standard error needs.")
    return Moments(mean, scatter / (count * (count - 1)), count)
