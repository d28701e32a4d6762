"""How fast are averages rebuilt from their files?

    OMP_NUM_THREADS=2 python benchmarks/ema_reconstruct.py FOLDER [--storage float32] [--times 64] [--rounds 5]

Writes 2 x 64 snapshots of a 10.7 M-parameter U-Net into FOLDER (5.5 GB in float32), then, from a warm cache, reads
every byte of them into tensors with safetensors, and rebuilds one and three widths, in turns. Median seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from lightning_diffusion import UNet
from lightning_diffusion.reconstruction import reconstruct
from lightning_diffusion.snapshots import Place, Snapshot, list_snapshots, network_hash, write_snapshot


def write(folder: Path, storage: str, times: int) -> None:
    """Snapshots of weights that walk."""
    network = UNet([3, 32, 32], channels=84, multipliers=[1, 2, 2], num_blocks=2, attention_levels=[1])
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    place = Place(folder, "benchmark", network_hash(weights), storage)  # type: ignore[arg-type]
    for step in range(1, times + 1):
        for x in weights.values():
            x.add_(torch.randn_like(x), alpha=1e-3)
        for width in (0.05, 0.10):
            base = place.path(step - 1, width) if storage == "difference" and (step - 1) % 8 else None
            write_snapshot(place, step, float(step), width, weights, base)


def load_all(snapshots: list[Snapshot]) -> None:
    """Every byte of every file, into memory of this process; files are mapped, so cloning is what reads them."""
    for snapshot in snapshots:
        for x in load_file(snapshot.path).values():
            x.clone()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--storage", default="float32", choices=["float32", "difference", "float16"])
    parser.add_argument("--times", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not options.folder.is_dir():
        write(options.folder, options.storage, options.times)
    snapshots = list_snapshots(options.folder)
    arms = {
        "load": lambda: load_all(snapshots),
        "one width": lambda: reconstruct(snapshots, [0.07]),
        "three widths": lambda: reconstruct(snapshots, [0.03, 0.07, 0.2]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(options.rounds + 1):
        for name, run in arms.items():
            began = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    size = sum(s.path.stat().st_size for s in snapshots) / 1e9
    print(f"{len(snapshots)} files, {size:.2f} GB")
    for name, t in seconds.items():
        print(f"  {name:13}{np.median(t):7.2f} s")
    print(f"  one width over load:         {np.median(np.divide(seconds['one width'], seconds['load'])):.2f}")
    print(
        f"  three widths over one width: {np.median(np.divide(seconds['three widths'], seconds['one width'])):.2f}"
    )


if __name__ == "__main__":
    main()
