"""What was computed from real images once, kept on disk under the hash of everything that it depends on.

Files are in `LIGHTNING_DIFFUSION_CACHE`, else in ~/.cache/lightning-diffusion. Each says of which content it is, and a
hash of its own tensors: one that was computed from something else, or is damaged, is computed anew. What computed it is
told by a probe as well, its output on fixed inputs: that cannot be hashed, as devices round differently.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from lightning_diffusion.io import tensors_hash, write_atomically

FOLDER = "LIGHTNING_DIFFUSION_CACHE"
_PROBE = "probe"
_ALIKE = 1e-3  # of its root mean square, by which a probe may differ: TF32 rounds by less

Tensors = dict[str, Tensor]


def cache_folder() -> Path:
    """Where the cache is."""
    return Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "lightning-diffusion")


def content_hash(*parts: object) -> str:
    """32 hexadecimal digits, of printable parts and the version of this package."""
    whole = (version("lightning-diffusion"), parts)
    return hashlib.blake2b(repr(whole).encode(), digest_size=16).hexdigest()


def cached(name: str, content: str, compute: Callable[[], Tensors], probe: Tensor | None = None) -> Tensors:
    """The tensors that `compute()` makes of `content`, from the cache if it holds just these.

    Args:
        name: begins the file's name.
        content: the `content_hash` of everything that the tensors depend on.
        compute: makes them.
        probe: output of what computes, on fixed inputs; a file with another one is computed anew.
    """
    path = cache_folder() / f"{name}-{content}.safetensors"
    found = _read(path, content)
    if found is None or not _alike(found.pop(_PROBE, None), probe):
        found = compute()
        _write(path, content, found if probe is None else {**found, _PROBE: probe})
    return found


def _alike(found: Tensor | None, probe: Tensor | None) -> bool:
    if found is None or probe is None:
        return found is probe
    near = _ALIKE * float(probe.square().mean().sqrt())
    return found.shape == probe.shape and bool(((found - probe).abs() <= near).all())


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
