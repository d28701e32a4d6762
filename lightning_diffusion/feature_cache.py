"""What was computed from real images once, kept on disk under the hash of everything that it depends on.

Files are in `LIGHTNING_DIFFUSION_CACHE`, else in ~/.cache/lightning-diffusion. Each says of which content it is, and a
hash of its own tensors: one that was computed from something else, or is damaged, is computed anew.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lightning_diffusion.io import tensors_hash, write_atomically

FOLDER = "LIGHTNING_DIFFUSION_CACHE"

Tensors = dict[str, Tensor]


def cache_folder() -> Path:
    """Where the cache is."""
    return Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "lightning-diffusion")


def content_hash(*parts: object) -> str:
    """32 hexadecimal digits, of printable parts."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def cached(name: str, content: str, compute: Callable[[], Tensors]) -> Tensors:
    """The tensors that `compute()` makes of `content`, from the cache if it holds just these."""
    path = cache_folder() / f"{name}-{content}.safetensors"
    found = _read(path, content)
    if found is None:
        found = compute()
        _write(path, content, found)
    return found


def _read(path: Path, content: str) -> Tensors | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    right = said.get("content") == content and said.get("tensors") == tensors_hash(tensors)
    return tensors if right else None


def _write(path: Path, content: str, tensors: Tensors) -> None:
    from safetensors.torch import save

    said = {"content": content, "tensors": tensors_hash(tensors)}
    whole = save({name: value.contiguous() for name, value in tensors.items()}, said)
    try:
        write_atomically(path, lambda file: file.write(whole))
    except OSError as error:
        warnings.warn(
            f"{path.parent} cannot be written to ({error.strerror}), so features of real images are computed anew in "
            f"every run: set {FOLDER} to a folder that can.",
            stacklevel=2,
        )
