"""Compute the latents of data once, and keep them on disk."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_diffusion.autoencoders import PretrainedAutoencoder, encode_images, fingerprint
from lightning_diffusion.batches import LABEL, Repeatable, unpack
from lightning_diffusion.checks import check_images
from lightning_diffusion.datamodules.base import BatchDataset, ResumableDataModule
from lightning_diffusion.latent_shards import (
    AUTOENCODER,
    Part,
    Shard,
    Writing,
    list_shards,
    shard_files,
    write_shard,
    write_tensors,
)

Tensors = dict[str, Tensor]
Batches = Iterator[Tensors]


def write_latents(
    data: ResumableDataModule | Dataset[Any],
    autoencoder: nn.Module,
    folder: str | Path,
    batch_size: int = 64,
    overwrite: bool = False,
    shard_bytes: int = 2**28,
) -> list[Shard]:
    """Write the latents of all images, unaugmented and in order, as `LatentsDataModule` reads them.

    Every file appears when it is whole; a folder in which some are missing is refused by the reader.

    Args:
        data: a datamodule, of which training and held-out data are kept apart, or a dataset of images, of
            (image, label) or of {"image", "label"}, which is all for training.
        autoencoder: any nn.Module with `encode` and `decode`, where it is; one that is measured on images is measured
            on the training data first. Put into eval mode.
        folder: to write to.
        batch_size: images that are encoded at once.
        overwrite: replace the latents that are there.
        shard_bytes: about how large a file is.

    Returns: what was written.

    Raises:
        FileExistsError: if the folder holds latents.
        TypeError: for other data.
        ValueError: for images outside [-1, 1] or not finite.
    """
    folder = Path(folder)
    _refuse_latents(folder, overwrite)
    workers = getattr(data, "num_workers", 0)
    loaders = {part: _loader(dataset, batch_size, workers) for part, dataset in _parts(data).items()}
    autoencoder.eval()
    if getattr(autoencoder, "needs_measuring", False):
        images = Repeatable(lambda: (unpack(batch)[0].float() for batch in loaders["training"]))
        autoencoder.measure(images)  # type: ignore[operator]
    for path in shard_files(folder):
        path.unlink()
    inner = autoencoder.autoencoder if isinstance(autoencoder, PretrainedAutoencoder) else autoencoder
    write_tensors(folder / AUTOENCODER, inner.state_dict())
    num_classes = _num_classes(data, loaders["training"])
    writing = Writing(secrets.token_hex(8), fingerprint(autoencoder), num_classes)
    for part, loader in loaders.items():
        for number, (rows, tensors) in enumerate(_cut(_encoded(loader, autoencoder), shard_bytes)):
            total = math.ceil(len(loader.dataset) / rows)  # type: ignore[arg-type]
            write_shard(folder, part, number, total, tensors, writing)
    return list_shards(folder)


def _refuse_latents(folder: Path, overwrite: bool) -> None:
    if folder.is_dir() and shard_files(folder) and not overwrite:
        raise FileExistsError(f"{folder} holds latents already: give another folder, or overwrite them.")


def _parts(data: ResumableDataModule | Dataset[Any]) -> dict[Part, Dataset[Any]]:
    if isinstance(data, Dataset):
        return {"training": data}
    if not isinstance(data, ResumableDataModule):
        raise TypeError(
            f"found {type(data).__name__}, expected a ResumableDataModule or a dataset: of another datamodule give the "
            "dataset of its training loader."
        )
    held_out = data.held_out_data()
    parts: dict[Part, Dataset[Any]] = {"training": data.training_data()}
    return {**parts, "held_out": held_out} if len(held_out) else parts


def _as_it_is(batch: Any) -> Any:
    return batch


def _loader(data: Dataset[Any], batch_size: int, num_workers: int) -> DataLoader[Any]:
    collate = _as_it_is if isinstance(data, BatchDataset) else default_collate
    generator = torch.Generator().manual_seed(0)
    return DataLoader(data, batch_size, num_workers=num_workers, collate_fn=collate, generator=generator)


def _num_classes(data: Any, loader: DataLoader[Any]) -> int:
    """As the data say, else one more than the largest label."""
    if hasattr(data, "num_classes"):
        return int(data.num_classes)
    if hasattr(data, "classes"):
        return len(data.classes)
    labels = [condition[LABEL].max() for _, condition in map(unpack, loader) if LABEL in condition]
    return int(torch.stack(labels).max()) + 1 if labels else 0


def _encoded(loader: DataLoader[Any], autoencoder: nn.Module) -> Batches:
    """mean, std and label of each batch, on the CPU."""
    device = next(iter([*autoencoder.parameters(), *autoencoder.buffers()]), torch.zeros(())).device
    for batch in track(loader, "Encoding", transient=True, disable=len(loader) < 10):
        images, condition = unpack(batch)
        check_images(images)
        posterior = encode_images(autoencoder, images.float().to(device))
        found = {**posterior._asdict(), "label": condition.get(LABEL)}
        yield {name: x.cpu() for name, x in found.items() if x is not None}


def _cut(batches: Batches, shard_bytes: int) -> Iterator[tuple[int, Tensors]]:
    """The batches in parts of equal numbers of samples, the last of what is left; with that number."""
    kept: list[Tensors] = []
    rows = 0
    for batch in batches:
        rows = rows or max(shard_bytes // sum(x[0].nbytes for x in batch.values()), 1)
        kept.append(batch)
        while sum(len(part["mean"]) for part in kept) >= rows:
            joined = _joined(kept)
            yield rows, {name: x[:rows] for name, x in joined.items()}
            kept = [{name: x[rows:] for name, x in joined.items()}]
    if kept and len(kept[0]["mean"]):
        yield rows, _joined(kept)


def _joined(parts: list[Tensors]) -> Tensors:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
