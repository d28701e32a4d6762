"""Snapshots of power-function averages: one file per time and width, from which any width is rebuilt.

A file NNNNNNNNN-WIDTH.safetensors holds tensors by parameter name. Its storage is
    float32      as they are
    float16      rounded: half the bytes, and an error that a reconstruction magnifies
    difference   int16 of (x - base) / scale, base the snapshot before: half the bytes, a small error
With differences every eighth snapshot of a width is float32, so that a lost file costs eight at most.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_diffusion.io import publish, sweep, temporary_beside

Storage = Literal["float32", "float16", "difference"]

BASE_EVERY = 8
BYTES = {"float32": 4.0, "float16": 2.0, "difference": (4 + 2 * (BASE_EVERY - 1)) / BASE_EVERY}
CHUNK = 1 << 13
LEVELS = 32767


class Snapshot(NamedTuple):
    """What a file's header says.

    `time` is the average's clock, `network` a hash of the parameters' names and shapes, `run` the run's identity.
    """

    path: Path
    step: int
    time: float
    sigma_rel: float
    run: str
    network: str
    base: str | None


@dataclass(frozen=True)
class Place:
    """Where and of what snapshots are: a folder, a run, a network."""

    folder: Path
    run: str
    network: str
    storage: Storage = "float32"

    def path(self, step: int, sigma_rel: float) -> Path:
        """File of a snapshot."""
        return self.folder / f"{step:09d}-{sigma_rel:g}.safetensors"


def network_hash(parameters: Mapping[str, Tensor]) -> str:
    """The same for the same names and shapes."""
    shapes = sorted((name, tuple(x.shape)) for name, x in parameters.items())
    return hashlib.blake2b(repr(shapes).encode(), digest_size=8).hexdigest()


def write_snapshot(
    place: Place,
    step: int,
    time: float,
    sigma_rel: float,
    average: Mapping[str, Tensor],
    base: Path | None = None,
) -> Path:
    """Write one average (float32, on the CPU); the file appears when it is whole.

    `base` is the file to store the difference to.
    """
    path = place.path(step, sigma_rel)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors, scales = _encode(average, place.storage, base)
    header = {"format": "lightning_diffusion.snapshot", "version": "1", "step": str(step), "time": repr(time)}
    header |= {"sigma_rel": repr(sigma_rel), "run": place.run, "network": place.network}
    if base is not None:
        header |= {"base": base.name, "scales": json.dumps(scales)}
    with temporary_beside(path) as temporary:
        save_file(tensors, temporary, header)
        publish(temporary, path)
    return path


def _encode(
    average: Mapping[str, Tensor], storage: Storage, base: Path | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    if base is None:
        dtype = torch.float16 if storage == "float16" else torch.float32
        return {name: x.to(dtype).contiguous() for name, x in average.items()}, {}
    before = decode(base)
    changes = {name: (x.double() - before[name]).contiguous() for name, x in average.items()}
    scales = {name: _largest(change) / LEVELS for name, change in changes.items()}
    return {name: (x / (scales[name] or 1)).round().to(torch.int16) for name, x in changes.items()}, scales


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def decode(path: Path) -> dict[str, Tensor]:
    """The average in a file, float64; a difference is added to the files that it builds on."""
    with safe_open(path, "pt") as file:
        header, names = file.metadata(), file.keys()
        parts = {name: file.get_tensor(name).double() for name in names}
    if "base" not in header:
        return parts
    before, scales = decode(path.with_name(header["base"])), json.loads(header["scales"])
    return {name: before[name] + part * scales[name] for name, part in parts.items()}


def read_header(path: Path) -> Snapshot:
    """What a file says about itself; refuses what is not a whole snapshot."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no whole snapshot ({error}). Delete it: the other snapshots of the run will do."
        ) from error
    if header.get("format") != "lightning_diffusion.snapshot":
        raise ValueError(f"{path} was not written by PostHocEMA. Move it out of the folder of the snapshots.")
    step, time, sigma_rel = int(header["step"]), float(header["time"]), float(header["sigma_rel"])
    return Snapshot(path, step, time, sigma_rel, header["run"], header["network"], header.get("base"))


def list_snapshots(folder: str | Path) -> list[Snapshot]:
    """All snapshots in a folder, by time and width; refuses those of several runs or networks together."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist: give the folder that PostHocEMA wrote, or its run's."
        )
    paths = [path for path in folder.glob("*.safetensors") if not path.name.startswith(".")]
    found = sorted((read_header(path) for path in paths), key=lambda s: (s.time, s.sigma_rel))
    _check_alike(found)
    return found


def _check_alike(found: Sequence[Snapshot]) -> None:
    names = {snapshot.path.name for snapshot in found}
    for snapshot in found:
        if (snapshot.run, snapshot.network) != (found[0].run, found[0].network):
            what = "run" if snapshot.network == found[0].network else "network"
            raise ValueError(
                f"{snapshot.path} is of another {what} than {found[0].path.name}. Keep one {what}'s in a folder."
            )
        if snapshot.base is not None and snapshot.base not in names:
            raise ValueError(
                f"{snapshot.path} is a difference to {snapshot.base}, which is missing. Restore that file, or "
                "delete those that build on it."
            )


def remove_after(folder: Path, step: int) -> None:
    """Forget snapshots from after a step, which a resumed run writes again."""
    if folder.is_dir():
        sweep(folder)
        for snapshot in list_snapshots(folder):
            if snapshot.step > step:
                snapshot.path.unlink()


def thin(snapshots: Sequence[Snapshot], keep: int) -> list[Snapshot]:
    """Those to remove so that `keep` times stay, the first, the last, and others at about equal ratios."""
    times = sorted({snapshot.time for snapshot in snapshots})
    while len(times) > max(keep, 2):
        times.remove(min(times[1:-1], key=lambda t: _gap(times, t)))
    return [snapshot for snapshot in snapshots if snapshot.time not in times]


def _gap(times: Sequence[float], t: float) -> float:
    """Ratio of the two times around t."""
    place = times.index(t)
    return times[place + 1] / times[place - 1]


def combine(snapshots: Sequence[Snapshot], coefficients: Tensor) -> list[dict[str, Tensor]]:
    """Weighted sums of snapshots, float32: coefficients (n, m) give m sets of weights in one pass over the files.

    Columns sum to 1; sums run over differences to the last snapshot, where float32 loses least.
    """
    rows = {snapshot.path.name: row for row, snapshot in enumerate(snapshots)}
    shares, whole = coefficients.clone(), torch.ones(len(snapshots), 1)
    for row in reversed(range(len(snapshots))):
        base = snapshots[row].base
        if base is not None:
            shares[rows[base]] += shares[row]
            whole[row] = 0
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(snapshot.path, "pt")) for snapshot in snapshots]
        scales = [json.loads(file.metadata().get("scales", "{}")) for file in files]
        reference = max(row for row, snapshot in enumerate(snapshots) if snapshot.base is None)
        sums: list[dict[str, Tensor]] = [{} for _ in range(coefficients.shape[1])]
        names = files[0].keys()
        for name in names:
            scale = torch.tensor([scale.get(name, 1.0) for scale in scales], dtype=torch.float64)
            parts = [file.get_tensor(name) for file in files]
            found = _combine(parts, (shares * scale[:, None]).T.float(), whole, reference)
            for target, weights in zip(sums, found, strict=True):
                target[name] = weights.view(parts[0].shape)
    return sums


def _combine(parts: Sequence[Tensor], shares: Tensor, whole: Tensor, reference: int) -> Tensor:
    """shares (m, n) @ parts (n, ...) flattened, chunk by chunk so that a chunk stays in the cache."""
    flat = [part.reshape(-1) for part in parts]
    out = torch.empty(len(shares), flat[0].numel())
    buffer = torch.empty(len(flat), min(CHUNK, flat[0].numel()))
    for start in range(0, flat[0].numel(), CHUNK):
        chunk = out[:, start : start + CHUNK]
        rows = buffer[:, : chunk.shape[1]]
        torch.stack([part[start : start + CHUNK].float() for part in flat], out=rows)
        centre = rows[reference].clone()
        chunk.copy_(torch.addmm(centre, shares, rows.addcmul_(whole, centre, value=-1)))
    return out
