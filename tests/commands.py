"""A small run from the command line, in this process or another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG = """\
# lightning-diffusion fit --config tiny.yaml
seed_everything: 1
model:
  network: {class_path: UNet, init_args: {image_shape: [1, 8, 8], channels: 8, num_blocks: 1, num_classes: 10}}
  objective: {class_path: EDM, init_args: {density: {init_args: {mean: -0.8}}}}
  sampler: {class_path: Heun, init_args: {num_steps: 3}}
  optimizer.lr: 2.0e-3
  learning_rate: WarmupCosine
data: {class_path: DigitsDataModule, init_args: {batch_size: 32}}
trainer:
  max_steps: 6
  log_every_n_steps: 2
  check_val_every_n_epoch: null
  val_check_interval: 4
  limit_val_batches: 2
  accelerator: cpu
  callbacks: [PowerFunctionEMA, SampleGrid]
"""


def write_config(folder: Path, name: str = "tiny.yaml") -> str:
    (folder / name).write_text(CONFIG)
    return name


def line(*arguments: str) -> list[str]:
    """`lightning-diffusion ARGUMENTS`, whatever is installed where."""
    script = "import sys; from lightning_diffusion.cli import main; sys.exit(main())"
    return [sys.executable, "-c", script, *arguments]


def command(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`lightning-diffusion ARGUMENTS` as a process of its own."""
    return subprocess.run(line(*arguments), cwd=cwd, capture_output=True, text=True, check=False, **options)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
