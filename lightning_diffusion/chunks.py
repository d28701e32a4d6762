"""Datasets in chunks, as litdata writes and fetches them, with what a training needs to know beside them.

    prepared.json                what is there; written last: without it the folder is not whole
    training/chunk-0-K.bin       samples of equal size; litdata's StreamingDataset reads them too
    training/index.json          litdata's: the chunks, their sizes, the form of a sample
    held_out/...                 the same
    autoencoder.safetensors      of latents: what they were made with

A sample is {"image": uint8 (C, H, W)} of pixels, {"mean": float32, "std": float32} (C, H, W) of latents, std only
where the autoencoder's posterior is random, and "label", an int, where there are classes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_diffusion.io import write_atomically

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # else each process asks the network

Kind = Literal["pixels", "latents"]
Part = Literal["training", "held_out"]

MANIFEST, INDEX, VERSION = "prepared.json", "index.json", 1
_MISSING = "litdata is not installed: run `pip install 'lightning-diffusion[streaming]'`."


@dataclass(frozen=True)
class Prepared:
    """What a folder of chunks holds.

    Args:
        kind: pixels or latents.
        shape: (C, H, W) of a sample.
        classes: their names, none without labels.
        training, held_out: samples.
        autoencoder: fingerprint of the one that made the latents.
        content: a hash of all chunks; "" where it was not taken.
        version: of this layout.
    """

    kind: Kind
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    training: int = 0
    held_out: int = 0
    autoencoder: str = ""
    content: str = ""
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Say that the folder is whole, and what its content hashes to."""
        write_json(folder / MANIFEST, asdict(self) | {"content": content_hash(folder)})


def content_hash(folder: Path) -> str:
    """Of every chunk and index, 32 hexadecimal digits; reads all of them."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([*folder.glob("*/chunk-*.bin"), *folder.glob(f"*/{INDEX}")]):
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, "blake2b").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()} {found}".encode())
    return digest.hexdigest()


def litdata() -> Any:
    """The package, or what to install."""
    try:
        import litdata.streaming.config
        import litdata.streaming.downloader
        import litdata.streaming.writer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_MISSING) from error
    return litdata


def write_json(path: Path, content: Any) -> None:
    """Atomically."""
    text = json.dumps(content, indent=1, sort_keys=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def chunk_name(number: int) -> str:
    """As litdata calls it."""
    return f"chunk-0-{number}.bin"


def write_chunk(folder: Path, number: int, samples: Mapping[str, Tensor]) -> None:
    """Write one chunk, which appears when it is whole.

    Args:
        folder: of the part.
        number: of the chunk.
        samples: tensors (N, ...) as the module's docstring lists, N at least 1; label int64 (N,).
    """
    writer = _writer(folder, number, len(next(iter(samples.values()))))
    for index, sample in enumerate(_samples(samples)):
        writer.add_item(index, sample)
    writer.write_chunk(on_done=True)


@contextlib.contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """What to do when the disk of `folder` is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        said = f"the disk is full ({os.strerror(error.errno)}): free some space and start the same command again, "
        raise OSError(error.errno, f"{said}it goes on where it was", str(folder)) from error


def _writer(folder: Path, number: int, size: int) -> Any:
    class AtomicWriter(litdata().streaming.writer.BinaryWriter):  # type: ignore[misc]
        def write_chunk_to_file(self, raw_data: bytes, filename: str, compress: bool | None = None) -> None:
            write_atomically(folder / filename, lambda file: file.write(raw_data))

    return AtomicWriter(str(folder), chunk_size=size, chunk_index=number)


def _samples(samples: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    for values in zip(*samples.values(), strict=True):
        yield {n: v if v.ndim else int(v) for n, v in zip(samples, values, strict=True)}


def write_index(folder: Path, count: int, samples: Mapping[str, Tensor]) -> int:
    """litdata's index of the chunks among `chunk_name(0)`, ..., `chunk_name(count - 1)`; returns the samples in them.

    Args:
        folder: of the part.
        count: of chunks; those of which no image was whole are not there.
        samples: of the same form as those written, (1, ...).
    """
    writer = _writer(folder, 0, 1)
    writer.add_item(0, next(_samples(samples)))
    files = [folder / chunk_name(number) for number in range(count)]
    chunks: list[dict[str, Any]] = [
        {
            "filename": file.name,
            "chunk_bytes": file.stat().st_size,
            "chunk_size": samples_in(file),
            "dim": None,
        }
        for file in files
        if file.exists()
    ]
    write_json(folder / INDEX, {"chunks": chunks, "config": {**writer.get_config(), "chunk_size": None}})
    return sum(chunk["chunk_size"] for chunk in chunks)


def samples_in(file: Path) -> int:
    """How many samples a chunk says that it has; 0 of an empty file."""
    with open(file, "rb") as opened:
        return int.from_bytes(opened.read(4), "little")
