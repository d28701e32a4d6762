"""Latents on disk: a folder of shards, each a safetensors file that appears when it is whole.

    PART-NUMBER.safetensors     PART is training or held_out
        mean, std   float32 (N, C, H, W), of the autoencoder's posterior; no std where it is not random
        label       int64 (N,), where there are labels
    autoencoder.safetensors     the parameters that the latents were made with

A header names the writing that a shard belongs to, and a hash of the autoencoder: shards do not mix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_diffusion.io import publish, sweep, temporary_beside

Part = Literal["training", "held_out"]

FORMAT, VERSION = "lightning_diffusion.latents", "1"
AUTOENCODER = "autoencoder.safetensors"


class Writing(NamedTuple):
    """What all shards of a folder share: an identity, the autoencoder's fingerprint, the number of classes."""

    identity: str
    autoencoder: str
    num_classes: int


class Shard(NamedTuple):
    """What a file's header says: it is `number` of `total` in its part, of `size` samples of `shape`."""

    path: Path
    part: Part
    number: int
    total: int
    size: int
    shape: tuple[int, ...]
    writing: Writing

    def tensors(self) -> dict[str, Tensor]:
        """mean, std, label: memory-mapped, so that only what is indexed is read."""
        with safe_open(self.path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}


def path_of(folder: Path, part: Part, number: int) -> Path:
    """File of a shard."""
    return folder / f"{part}-{number:05d}.safetensors"


def write_shard(
    folder: Path, part: Part, number: int, total: int, tensors: Mapping[str, Tensor], writing: Writing
) -> None:
    """Write one shard."""
    header = {"format": FORMAT, "version": VERSION, "part": part, "number": str(number), "total": str(total)}
    header |= {name: str(value) for name, value in writing._asdict().items()}
    write_tensors(path_of(folder, part, number), tensors, header)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str] | None = None) -> None:
    """A safetensors file that appears when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    with temporary_beside(path) as temporary:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, header)
        publish(temporary, path)


def read_header(path: Path) -> Shard:
    """What a file says about itself; refuses what is not a whole shard in its place."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            size, *shape = file.get_slice("mean").get_shape() if header.get("format") == FORMAT else [0]
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no whole shard of latents ({error}): write the latents again."
        ) from error
    if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"{path} was not written by write_latents, or by another version of it: move it out of the folder, or "
            "write the latents again."
        )
    number, total, num_classes = (int(header[name]) for name in ("number", "total", "num_classes"))
    writing = Writing(header["identity"], header["autoencoder"], num_classes)
    part: Part = "training" if header["part"] == "training" else "held_out"
    if path.name != path_of(path.parent, part, number).name:
        raise ValueError(
            f"{path} says that it is {path_of(path.parent, part, number).name}: give it its name back."
        )
    return Shard(path, part, number, total, size, tuple(shape), writing)


def list_shards(folder: str | Path) -> list[Shard]:
    """All shards of a folder in order; refuses a folder without any, mixed ones, and one that lacks some.

    Raises:
        FileNotFoundError: no such folder, or no latents in it.
        ValueError: naming the file that is wrong or missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: give the folder that write_latents wrote")
    shards = [read_header(path) for path in sorted(shard_files(folder))]
    if not shards:
        raise FileNotFoundError(f"{folder} holds no latents: give the folder that write_latents wrote")
    for shard in shards:
        _check_alike(shard, shards[0])
    for part in ("training", "held_out"):
        _check_complete([shard for shard in shards if shard.part == part])
    return shards


def shard_files(folder: Path) -> list[Path]:
    """The files of a folder that have a shard's name."""
    return [*folder.glob("training-*.safetensors"), *folder.glob("held_out-*.safetensors")]


def _check_alike(shard: Shard, first: Shard) -> None:
    if shard.writing != first.writing or shard.shape != first.shape:
        what = "autoencoder" if shard.writing.autoencoder != first.writing.autoencoder else "writing"
        raise ValueError(
            f"{shard.path} is of another {what} than {first.path.name}: keep the latents of one writing in a folder."
        )


def _check_complete(shards: Sequence[Shard]) -> None:
    found = {shard.number for shard in shards}
    missing = sorted(set(range(shards[0].total)) - found) if shards else []
    if missing:
        path = path_of(shards[0].path.parent, shards[0].part, missing[0])
        raise ValueError(
            f"{path} is missing, with it {len(missing)} of {shards[0].total} shards: the writing was stopped, or files "
            "were lost. Write the latents again."
        )
