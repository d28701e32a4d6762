"""Snapshot files: whole or not there, each naming its run, and nothing lost beyond what its storage says."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from lightning_diffusion.snapshots import (
    Place,
    combine,
    list_snapshots,
    network_hash,
    remove_after,
    thin,
    write_snapshot,
)


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (40_000,), "scalar": (), "empty": (0, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def place(folder, storage="float32", run="r", network=None) -> Place:
    return Place(folder, run, network or network_hash(weights(0)), storage)


def write(
    folder, steps=(1, 2, 3, 4), storage="float32", run="r", base_at=None
) -> list[dict[str, torch.Tensor]]:
    where, written = place(folder, storage, run), []
    for step in steps:
        written.append({name: x + 1e-3 * step * weights(step)[name] for name, x in weights(0).items()})
        base = None if base_at is None or step == base_at else where.path(step - 1, 0.05)
        write_snapshot(where, step, float(step), 0.05, written[-1], base)
    return written


def test_a_file_says_what_it_is(tmp_path):
    write(tmp_path)
    snapshots = list_snapshots(tmp_path)
    assert [s.step for s in snapshots] == [1, 2, 3, 4]
    assert {(s.sigma_rel, s.run, s.network) for s in snapshots} == {(0.05, "r", network_hash(weights(0)))}


COEFFICIENTS = torch.tensor([[0.5, -3.0], [2.0, 1.0], [-4.0, 2.0], [2.5, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("storage", "base_at", "error"),
    [("float32", None, 1e-6), ("difference", 1, 2e-6), ("float16", None, 5e-3)],
)
def test_weighted_sums_are_as_good_as_the_storage(tmp_path, storage, base_at, error):
    written = write(tmp_path, storage=storage, base_at=base_at)
    found = combine(list_snapshots(tmp_path), COEFFICIENTS)
    for column, rebuilt in zip(COEFFICIENTS.T, found, strict=True):
        want = {
            n: sum(float(x) * w[n].double() for x, w in zip(column, written, strict=True)) for n in written[0]
        }
        assert_close({n: x.double() for n, x in rebuilt.items()}, want, rtol=0, atol=error * 5)


def test_sums_of_nearly_equal_files_lose_no_more_than_float32(tmp_path):
    base = {"w": torch.full((1000,), 1000.0)}
    where = Place(tmp_path, "r", network_hash(base))
    for step in (1, 2):
        write_snapshot(where, step, float(step), 0.05, {"w": base["w"] + 1e-3 * step})
    (rebuilt,) = combine(list_snapshots(tmp_path), torch.tensor([[-19.0], [20.0]], dtype=torch.float64))
    want = (20 * (base["w"] + 2e-3).double() - 19 * (base["w"] + 1e-3).double()).float()
    assert torch.equal(rebuilt["w"], want)


def test_differences_take_half_the_bytes(tmp_path):
    write(tmp_path, steps=(1, 2), storage="difference", base_at=1)
    full, half = (path.stat().st_size for path in sorted(tmp_path.iterdir()))
    assert half == pytest.approx(full / 2, rel=0.01)


def test_what_a_crash_left_is_not_read(tmp_path):
    write(tmp_path, steps=(1, 2))
    (tmp_path / ".000000003-0.05.safetensors.host.1.tmp").write_bytes(b"half")
    assert len(list_snapshots(tmp_path)) == 2


def test_a_truncated_file_is_named(tmp_path):
    write(tmp_path)
    path = tmp_path / "000000002-0.05.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"000000002-0\.05\.safetensors is no whole snapshot.*Delete it"):
        list_snapshots(tmp_path)


def test_other_files_runs_and_networks_are_named(tmp_path):
    write(tmp_path, steps=(1,))
    write(tmp_path, steps=(2,), run="other")
    with pytest.raises(ValueError, match=r"000000002.* is of another run than 000000001"):
        list_snapshots(tmp_path)
    write_snapshot(place(tmp_path, network="other"), 2, 2.0, 0.05, weights(0))
    with pytest.raises(ValueError, match="is of another network than"):
        list_snapshots(tmp_path)
    (tmp_path / "x.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(ValueError, match=r"x\.safetensors was not written by PostHocEMA"):
        list_snapshots(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone does not exist: give the folder"):
        list_snapshots(tmp_path / "gone")


def test_a_difference_without_its_base_is_named(tmp_path):
    write(tmp_path, storage="difference", base_at=1)
    (tmp_path / "000000001-0.05.safetensors").unlink()
    with pytest.raises(ValueError, match=r"000000002.* is a difference to 000000001.* which is missing"):
        list_snapshots(tmp_path)


def test_a_resumed_run_forgets_what_came_later(tmp_path):
    write(tmp_path)
    remove_after(tmp_path, 2)
    assert [s.step for s in list_snapshots(tmp_path)] == [1, 2]


def test_thinning_keeps_the_ends_and_a_geometric_spacing(tmp_path):
    write(tmp_path, steps=range(1, 65))
    snapshots = list_snapshots(tmp_path)
    kept = sorted({s.step for s in snapshots} - {s.step for s in thin(snapshots, 12)})
    assert len(kept) == 12
    assert kept[0] == 1
    assert kept[-1] == 64
    ratios = [b / a for a, b in pairwise(kept[4:])]
    assert max(ratios) < 1.8 * min(ratios)
