"""Open exports where this package is not: one fresh environment with plain diffusers, one with torch alone.

python benchmarks/export_elsewhere.py [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from exported_modules import DIFFUSERS, LABEL, NOISE, TORCH, dit, drawn, module, unet

import lightning_diffusion as ld

VERSION = f"torch=={torch.__version__.partition('+')[0]}"
NEEDS = {"diffusers": [VERSION, "diffusers", "safetensors"], "torch": [VERSION, "numpy"]}
MODELS = {
    "UNet2DModel, EDM": (unet, ld.EDM(), ld.DPMSolver2M(20)),
    "DiTTransformer2DModel, DDPM": (dit, ld.DDPM(), ld.Euler(20)),
    "DiTTransformer2DModel, v": (dit, ld.VPrediction(), ld.DPMSolver2M(20)),
}
RUN = {
    "diffusers": DIFFUSERS + "\nx = draw(folder, steps, noise, label)",
    "torch": TORCH + "\nx = draw(folder + '.pt2', noise, label)",
}
SCRIPT = """
import importlib.util, sys, torch
folder, steps = sys.argv[1], int(sys.argv[2])
assert not any(map(importlib.util.find_spec, ("lightning_diffusion", "lightning")))
noise, label = torch.load(sys.argv[3])
{run}
torch.save(x, folder + ".drawn")
"""


def environment(folder: Path, name: str) -> Path:
    """The Python of a new environment."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
    python = folder / name / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *NEEDS[name]], check=True, cwd=folder)
    return python


def difference(python: Path, run: str, place: Path, name: str) -> float:
    """The largest difference in any pixel of what is drawn there and here."""
    network, objective, sampler = MODELS[name]
    sampler = sampler if run == "diffusers" else ld.Euler(sampler.num_steps)
    model = module(network(), objective, sampler=sampler)
    ld.export_diffusers(model, place) if run == "diffusers" else ld.export_program(model, f"{place}.pt2")
    torch.save((NOISE, LABEL), place.parent / "given.pt")
    script = SCRIPT.replace("{run}", RUN[run])
    given = [str(place), str(sampler.num_steps), str(place.parent / "given.pt")]
    subprocess.run([str(python), "-I", "-c", script, *given], check=True, cwd=place.parent)
    return (torch.load(f"{place}.drawn") - drawn(model, sampler)).abs().max().item()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="for the environments, some gigabytes (a temporary one)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        print("| environment | model | largest difference |\n|---|---|---|")
        for run in NEEDS:
            python = environment(folder, run)
            for number, name in enumerate(MODELS):
                found = difference(python, run, folder / f"{run}-{number}", name)
                print(f"| {' '.join(NEEDS[run])} | {name} | {found:.1e} |", flush=True)


if __name__ == "__main__":
    main()
