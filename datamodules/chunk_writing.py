"""Write a folder of images, or their latents, in chunks; stopped in any way, it goes on where it was.

Chunk k holds the images k n, ..., (k + 1) n - 1 of a part, whatever was there before: so the result does not depend on
stops. A chunk is there whole or not at all, and prepared.json is written last.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_diffusion.autoencoders import PretrainedAutoencoder, encode_images, fingerprint
from lightning_diffusion.batches import Repeatable
from lightning_diffusion.chunk_reading import read_json, read_prepared
from lightning_diffusion.chunks import (
    MANIFEST,
    Part,
    Prepared,
    chunk_name,
    naming_full_disk,
    write_chunk,
    write_index,
    write_json,
)
from lightning_diffusion.datamodules.base import to_unit_range
from lightning_diffusion.datamodules.image_folder import NONE_WHOLE, ImageFolderDataModule, OnDisk
from lightning_diffusion.datamodules.images import BrokenImageError
from lightning_diffusion.io import refuse_other_weights
from lightning_diffusion.latent_shards import AUTOENCODER, write_tensors
from lightning_diffusion.resume import hash_seed

PLAN = "preparing.json"
PARTS: tuple[Part, Part] = ("training", "held_out")

Tensors = dict[str, Tensor]


class WholeImages(Dataset[Tensors]):
    """8-bit images and labels by index; broken ones are left out or refused."""

    def __init__(self, data: OnDisk) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> Tensors:
        found = [(image, index) for index in indices for image in self._read(index)]
        empty = torch.empty(0, self.data.channels, *self.data.size, dtype=torch.uint8)
        images = torch.stack([image for image, _ in found]) if found else empty
        labels = [self.data.files.labels[index] for _, index in found]
        return {"image": images} | ({"label": torch.tensor(labels)} if self.data.labels else {})

    def _read(self, index: int) -> list[Tensor]:
        try:
            return [self.data.read(index)]
        except BrokenImageError as error:
            self.data.refuse(error)
            return []


@dataclass(frozen=True)
class ChunkWriter:
    """Writes a folder of images in chunks.

    Args:
        autoencoder: writes latents instead of pixels; where it is, in eval mode.
        batch_size: images that are read and encoded at once.
        num_workers: processes that read images.
        chunk_bytes: about how large a chunk is.
        overwrite: replace what was prepared in another way.
    """

    autoencoder: nn.Module | None = None
    batch_size: int = 64
    num_workers: int = 0
    chunk_bytes: int = 2**26
    overwrite: bool = False

    def write(self, data: ImageFolderDataModule, folder: str | Path) -> Prepared:
        """Write, or go on writing, training and held-out images.

        Raises:
            BrokenImageError: naming the file, unless `data` leaves such files out.
            FileExistsError: if `folder` holds anything else.
            OSError: if the disk is full.
        """
        with naming_full_disk(Path(folder)):
            return self._write(data, Path(folder))

    def _write(self, data: ImageFolderDataModule, folder: Path) -> Prepared:
        plan = self._plan(data)
        if self._begin(folder, plan):
            return read_prepared(str(folder))
        form = self._form(data, folder)
        rows = max(self.chunk_bytes // sum(x[0].nbytes for x in form.values()), 1)
        counts = self._write_parts(data, folder, rows, form)
        if not counts["training"]:
            raise BrokenImageError(NONE_WHOLE)
        prepared = Prepared(
            kind="latents" if self.autoencoder else "pixels",
            shape=tuple(form["mean" if self.autoencoder else "image"].shape[1:]),
            classes=tuple(data.classes),
            autoencoder=fingerprint(self.autoencoder) if self.autoencoder else "",
            training=counts["training"],
            held_out=counts["held_out"],
        )
        prepared.write(folder)
        return read_prepared(str(folder))

    def _plan(self, data: ImageFolderDataModule) -> dict[str, Any]:
        """What decides over every byte that is written."""
        if isinstance(self.autoencoder, PretrainedAutoencoder):
            self.autoencoder.measure(())
        files = {part: _files(getattr(data, part)) for part in ("training", "held_out")}
        return {
            "autoencoder": fingerprint(self.autoencoder) if self.autoencoder else "",
            "batch_size": self.batch_size,
            "chunk_bytes": self.chunk_bytes,
            "classes": data.classes,
            "files": files,
            "shape": [data.training.channels, *data.training.size],
        }

    def _begin(self, folder: Path, plan: dict[str, Any]) -> bool:
        """Whether everything is there already; refuses what was planned otherwise."""
        if (folder / PLAN).is_file() and read_json(folder / PLAN) == plan:
            return (folder / MANIFEST).is_file()
        if folder.is_dir() and any(folder.iterdir()) and not (self.overwrite and (folder / PLAN).is_file()):
            raise FileExistsError(_refusal(folder))
        for name in (MANIFEST, AUTOENCODER):
            (folder / name).unlink(missing_ok=True)
        for part in PARTS:
            shutil.rmtree(folder / part, ignore_errors=True)
        write_json(folder / PLAN, plan)
        return False

    def _form(self, data: ImageFolderDataModule, folder: Path) -> Tensors:
        """One sample of zeros, encoded if asked, (1, ...)."""
        self._settle_autoencoder(data, folder)
        images = torch.zeros(1, data.training.channels, *data.training.size, dtype=torch.uint8)
        label = {"label": torch.zeros(1, dtype=torch.int64)} if data.classes else {}
        return self._encoded({"image": images, **label})

    def _settle_autoencoder(self, data: ImageFolderDataModule, folder: Path) -> None:
        """Measure it if it has to be, once: a start after a stop takes what was measured."""
        if self.autoencoder is None:
            return
        made, path = self.autoencoder.eval(), folder / AUTOENCODER
        inner = made.autoencoder if isinstance(made, PretrainedAutoencoder) else made
        if path.is_file():
            state = load_file(path)
            refuse_other_weights(state, inner.state_dict(), path)  # type: ignore[operator, arg-type, unused-ignore]
            inner.load_state_dict(state)  # type: ignore[operator, unused-ignore]
            return
        if getattr(made, "needs_measuring", False):
            images = WholeImages(data.training)
            made.measure(Repeatable(lambda: self._batches(images, range(len(images)))))  # type: ignore[operator]
        write_tensors(path, inner.state_dict())  # type: ignore[operator, arg-type, unused-ignore]

    def _batches(self, images: WholeImages, indices: range) -> Iterator[Tensor]:
        return (to_unit_range(batch["image"]) for batch in self._loaded(images, [indices]))

    def _write_parts(
        self, data: ImageFolderDataModule, folder: Path, rows: int, form: Tensors
    ) -> dict[Part, int]:
        sources = {part: WholeImages(getattr(data, part)) for part in PARTS}
        total, counts = sum(map(len, sources.values())), {}
        with Progress(transient=True, disable=total < 500) as progress:
            task = progress.add_task("Encoding" if self.autoencoder else "Writing", total=total)
            for part, images in sources.items():
                chunks = [
                    range(first, min(first + rows, len(images))) for first in range(0, len(images), rows)
                ]
                for number in self._write_missing(images, chunks, folder / part):
                    progress.advance(task, len(chunks[number]))
                counts[part] = write_index(folder / part, len(chunks), form) if chunks else 0
        return counts

    def _write_missing(self, images: WholeImages, chunks: list[range], folder: Path) -> Iterator[int]:
        """Numbers of the chunks, as they are there."""
        there = [(folder / chunk_name(number)).is_file() for number in range(len(chunks))]
        missing = [number for number, is_there in enumerate(there) if not is_there]
        yield from (number for number, is_there in enumerate(there) if is_there)
        batches = iter(self._loaded(images, [chunks[number] for number in missing]))
        for number in missing:
            read = [next(batches) for _ in _cut(chunks[number], self.batch_size)]
            parts = [self._encoded(batch) for batch in read if len(batch["image"])]
            if parts:
                write_chunk(
                    folder, number, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                )
            yield number

    def _loaded(self, images: WholeImages, ranges: Sequence[range]) -> Any:
        batches = [batch for indices in ranges for batch in _cut(indices, self.batch_size)]
        generator = torch.Generator().manual_seed(0)  # else it draws from the global one
        return DataLoader(
            images,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            generator=generator,
        )

    def _encoded(self, batch: Tensors) -> Tensors:
        if self.autoencoder is None:
            return batch
        images = to_unit_range(batch["image"])
        held = next(iter([*self.autoencoder.parameters(), *self.autoencoder.buffers()]), images)
        found = encode_images(self.autoencoder, images.to(held.device))._asdict()
        latents = {name: x.float().cpu() for name, x in found.items() if x is not None}
        return {**latents, **{name: x for name, x in batch.items() if name != "image"}}


def _cut(indices: range, size: int) -> list[range]:
    return [indices[first : first + size] for first in range(0, len(indices), size)]


def _as_it_is(batch: Any) -> Any:
    return batch


def _files(data: OnDisk) -> str:
    """A hash of names, sizes and labels of the files, and of what becomes of broken ones."""
    sizes = [path.stat().st_size for path in data.files.paths]
    found = list(zip(data.files.names(), sizes, data.files.labels, strict=True))
    return f"{len(found)} files {hash_seed(found, data.skip_broken):016x}"


def _refusal(folder: Path) -> str:
    if (folder / PLAN).is_file():
        return (
            f"{folder} holds what was prepared from other images or with other options: give another folder, or "
            "overwrite it."
        )
    return f"{folder} holds other files: give a folder that is empty, or not there yet."
