r"""Averages of any width after training, from snapshots of a few (Karras et al. 2024, sec. 3.2).

A power-function average at time t with exponent A = gamma + 1 has the profile p(tau) = A tau^(A-1) / t^A on [0, t].
Coefficients X of n snapshots rebuild a target profile as sum_i X_i p_i, where

    G X = b,   G_ij = <p_i, p_j>,   b_i = <p_i, target>,   sum X = 1

minimises the expected squared error of the weights if they scatter as the inner product says. With
m = min(t_a, t_b), r_a = (m/t_a)^A, r_b = (m/t_b)^B:

    white         weights are independent:   A B r_a r_b / ((A + B - 1) m)                    EDM2's; X normalised
    random walk   increments are independent: m (1 - r_a/(A+1) - r_b/(B+1) + r_a r_b/(A+B+1))  sum X = 1 enforced
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_diffusion.profiles import gamma_from_sigma_rel

Metric = Literal["white", "random_walk"]

MOST_TIMES = 256


def inner_products(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], metric: Metric) -> Tensor:
    """<a_i, b_j> of profiles given by (times, exponents), each (n,) and (m,), float64, as (n, m)."""
    (ta, A), (tb, B) = (a[0][:, None], a[1][:, None]), (b[0][None], b[1][None])
    m = torch.minimum(ta, tb)
    ra, rb = (m / ta) ** A, (m / tb) ** B
    if metric == "white":
        return A * B * ra * rb / ((A + B - 1) * m)
    return m * (1 - ra / (A + 1) - rb / (B + 1) + ra * rb / (A + B + 1))


def solve_coefficients(
    snapshot_times: Sequence[float],
    snapshot_sigma_rels: Sequence[float],
    time: float,
    sigma_rel: float,
    metric: Metric = "white",
) -> Tensor:
    """Coefficients (n,) of snapshots whose weighted sum is the average of width `sigma_rel` at `time`, float64.

    Args:
        snapshot_times, snapshot_sigma_rels: when and of which width each snapshot is, both (n,).
        time: when, on the same clock.
        sigma_rel: the width wanted.
        metric: what the weights are assumed to do; "white" is the published choice.
    """
    have = _profiles(snapshot_times, snapshot_sigma_rels)
    want = _profiles([time], [sigma_rel])
    _check_times(snapshot_times, time)
    G, b = inner_products(have, have, metric), inner_products(have, want, metric)
    scale = G.diagonal().rsqrt()[:, None]
    G, right = G * scale * scale.T, torch.cat([scale * b, scale], dim=1)
    solution: Tensor = scale * torch.linalg.solve(G, right)
    y, z = solution[:, 0], solution[:, 1]
    if metric == "white":
        return y / y.sum()
    return y + z * (1 - y.sum()) / z.sum()


def predicted_error(
    snapshot_times: Sequence[float],
    snapshot_sigma_rels: Sequence[float],
    time: float,
    sigma_rel: float,
    coefficients: Tensor,
) -> float:
    """Error of a reconstruction over |average - current weights|, both expected, if the weights walk randomly."""
    have, want = _profiles(snapshot_times, snapshot_sigma_rels), _profiles([time], [sigma_rel])
    G = inner_products(have, have, "random_walk")
    b = inner_products(have, want, "random_walk")[:, 0]
    square = inner_products(want, want, "random_walk")[0, 0]
    error = coefficients @ G @ coefficients - 2 * coefficients @ b + square
    distance = time / (2 * want[1][0] + 1)
    return float((error.clamp(min=0) / distance).sqrt())


def _profiles(times: Sequence[float], sigma_rels: Sequence[float]) -> tuple[Tensor, Tensor]:
    exponents = {sigma_rel: gamma_from_sigma_rel(sigma_rel) + 1 for sigma_rel in sigma_rels}
    return (
        torch.tensor(times, dtype=torch.float64),
        torch.tensor([exponents[s] for s in sigma_rels], dtype=torch.float64),
    )


def _check_times(times: Sequence[float], time: float) -> None:
    if len(set(times)) > MOST_TIMES:
        raise ValueError(
            f"Found snapshots of {len(set(times))} times; with more than {MOST_TIMES} the equations cannot be "
            "solved in float64. Leave out every second one."
        )
    if not (times and min(times) > 0 and 0 < time <= max(times)):
        found = f"{min(times):g} to {max(times):g}" if times else "none"
        raise ValueError(
            f"Time {time:g} is not within the snapshots, whose times are {found}. Write one of those."
        )
