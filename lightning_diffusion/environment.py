"""What a run ran on: versions, hardware, the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("lightning-diffusion", "torch", "lightning", "numpy")


def environment() -> dict[str, str | int]:
    """Plain data, of the present process and folder.

    `commit` is that of the repository which the present folder belongs to, with `-dirty` where tracked files have been
    changed; it is left out where there is none.
    """
    found: dict[str, str | int] = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {package: version for package in _PACKAGES if (version := _version(package))}
    found |= {"cpu": _processor(), "cpu_count": os.cpu_count() or 0, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpu_count": torch.cuda.device_count()}
        found |= {"cuda": str(torch.version.cuda)}
    commit = git_commit()
    return found | ({"commit": commit} if commit else {})


def git_commit(folder: str | Path = ".") -> str | None:
    """40 hexadecimal digits, `-dirty` behind them if tracked files differ; None outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: str | Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
