"""Weights averaged over any width, after training: from a run's snapshots, or from ordinary checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_diffusion.io import checkpoint_of, load_checkpoint
from lightning_diffusion.posthoc import MOST_TIMES, Metric, predicted_error, solve_coefficients
from lightning_diffusion.snapshots import Snapshot, combine, list_snapshots, thin

SNAPSHOTS = "snapshots"


class Reconstruction(NamedTuple):
    """An average of width `sigma_rel` at `step`; `error` is what to expect of |rebuilt - true| / |true - online|."""

    sigma_rel: float
    step: int
    error: float
    weights: dict[str, Tensor]


def snapshots_of(place: str | Path) -> list[Snapshot]:
    """The snapshots in a folder, or of a run, wherever its checkpoint says that they are."""
    place = Path(place)
    candidates = [place / SNAPSHOTS, place]
    folder = next((f for f in candidates if f.is_dir() and any(f.glob("*.safetensors"))), None)
    found = list_snapshots(folder or _recorded_folder(place))
    if not found:
        raise FileNotFoundError(f"{place} holds no snapshots: train with PostHocEMA among the callbacks.")
    return found


def _recorded_folder(place: Path) -> Path:
    try:
        states = load_checkpoint(checkpoint_of(place)).get("callbacks", {})
    except FileNotFoundError:
        states = {}
    folder = states.get("EMA", {}).get("snapshots", {}).get("folder")
    if folder is None:
        raise FileNotFoundError(
            f"{place} holds no snapshots: give the folder that PostHocEMA wrote, or its run's."
        )
    return Path(folder)


def reconstruct(
    snapshots: Sequence[Snapshot],
    sigma_rels: Sequence[float],
    step: int | None = None,
    metric: Metric = "random_walk",
) -> list[Reconstruction]:
    """Averages of several widths at the time of a snapshot (the last, if not given), in one pass over the files."""
    end = _at(snapshots, step)
    used = [s for s in snapshots if s.time <= end.time]
    removed = {s.path for s in thin(used, MOST_TIMES)}
    rows = torch.tensor([s.path not in removed for s in used])
    times = [s.time for s in used if s.path not in removed]
    widths = [s.sigma_rel for s in used if s.path not in removed]
    coefficients = torch.zeros(len(used), len(sigma_rels), dtype=torch.float64)
    solved = [solve_coefficients(times, widths, end.time, sigma_rel, metric) for sigma_rel in sigma_rels]
    coefficients[rows] = torch.stack(solved, 1)
    errors = [predicted_error(times, widths, end.time, s, x) for s, x in zip(sigma_rels, solved, strict=True)]
    weights = combine(used, coefficients)
    return [Reconstruction(s, end.step, e, w) for s, e, w in zip(sigma_rels, errors, weights, strict=True)]


def _at(snapshots: Sequence[Snapshot], step: int | None) -> Snapshot:
    steps = sorted({snapshot.step for snapshot in snapshots})
    wanted = steps[-1] if step is None else step
    if wanted not in steps:
        near = min(steps, key=lambda known: abs(known - wanted))
        raise ValueError(
            f"There is no snapshot of step {wanted}: they are of {len(steps)} steps from {steps[0]} to {steps[-1]}, "
            f"the nearest is {near}."
        )
    return next(snapshot for snapshot in snapshots if snapshot.step == wanted)


def average_checkpoints(
    paths: Sequence[str | Path], decay: float = 1.0, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Mean of the online weights of N checkpoints with shares proportional to decay^(N - i), in order of steps.

    Args:
        paths: files of one run, read one at a time.
        decay: 1 is the plain mean.
        names: entries of the state dict to average; all of floating point if not given.
    """
    if not 0 < decay <= 1:
        raise ValueError(
            f"decay={decay!r}: the share of an older checkpoint over the next is in (0, 1]; write 0.9."
        )
    steps = {path: load_checkpoint(path)["global_step"] for path in paths}
    mean: dict[str, Tensor] = {}
    total = 0.0
    for path in sorted(paths, key=steps.__getitem__):
        total = decay * total + 1
        _move(mean, dict(_weights(load_checkpoint(path), names)), 1 / total, str(path))
    return mean


def _weights(checkpoint: Mapping[str, Any], names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
    state = checkpoint.get("current_model_state", checkpoint["state_dict"])
    for name, x in state.items():
        if x.is_floating_point() and (names is None or name in names):
            yield name, x.to(torch.promote_types(x.dtype, torch.float32))


def _move(mean: dict[str, Tensor], weights: dict[str, Tensor], share: float, path: str) -> None:
    if not mean:
        mean.update({name: x.clone() for name, x in weights.items()})
        return
    wrong = [
        n
        for n in mean.keys() | weights.keys()
        if n not in mean or n not in weights or mean[n].shape != weights[n].shape
    ]
    if wrong:
        raise ValueError(
            f"{path} is of another network than the others: {sorted(wrong)[0]!r} differs. Leave it out."
        )
    for name, x in weights.items():
        mean[name].lerp_(x, share)
