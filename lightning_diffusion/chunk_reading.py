"""Samples out of chunks by their index, from a folder of this machine or through litdata from a bucket.

litdata knows the files, fetches those that are far away, whole and once per machine, and decodes the samples. Which of
them is read when is not its part here: see `chunk_order`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_diffusion.chunks import INDEX, MANIFEST, VERSION, Part, Prepared, litdata, samples_in
from lightning_diffusion.feature_cache import cache_folder
from lightning_diffusion.resume import hash_seed

OPEN_CHUNKS = 128  # memory-mapped at once, by each process
WAIT_SECONDS, POLL_SECONDS = 600.0, 0.05
_AGAIN = "start the same `lightning-diffusion prepare` again, it goes on where it was stopped."

Mapped = tuple[memoryview, list[int]]
"""A chunk's bytes, and where each sample begins in them, and the last ends."""


@dataclass(frozen=True)
class ChunkCache:
    """Where chunks of a bucket are kept on this machine.

    Args:
        folder: by default ~/.cache/lightning-diffusion, or LIGHTNING_DIFFUSION_CACHE; each prepared content has one of
            its own below it, so that data prepared anew under the same address are fetched anew.
        gigabytes: the chunks that were not opened for the longest time are removed above that; None: never.
    """

    folder: str | None = None
    gigabytes: float | None = None

    def folder_of(self, content: str) -> Path:
        """The folder for what hashes to `content`."""
        return self.root / f"chunks-{content}"

    @property
    def root(self) -> Path:
        """Of all contents."""
        return Path(self.folder) if self.folder is not None else cache_folder()

    def trim(self, folder: Path, keep: Path) -> None:
        """Remove the oldest chunks in `folder`, never `keep`; whoever reads one keeps what it has mapped."""
        if self.gigabytes is None:
            return
        files = sorted(
            (s.st_mtime, s.st_size, path) for path in folder.glob("*/*.bin") for s in _status(path)
        )
        excess = sum(size for _, size, _ in files) - self.gigabytes * 1e9
        for _, size, path in files:
            if excess > 0 and path != keep:
                path.unlink(missing_ok=True)
                excess -= size


def _status(path: Path) -> list[os.stat_result]:
    try:
        return [path.stat()]
    except FileNotFoundError:
        return []


def is_remote(source: str) -> bool:
    """Whether litdata has to fetch: s3://, gs://, r2://, azure://, hf://, or local: as an exercise."""
    return "://" in source or source.startswith("local:")


class MissingChunkError(ValueError):
    """A chunk that is listed is not there."""


class ChunkReader:
    """Samples of one part of a prepared folder.

    Args:
        source: folder, or the address of a bucket.
        part: training or held_out.
        cache: for a bucket.

    Raises:
        FileNotFoundError: if nothing was prepared there.
        ValueError: if it is not whole, naming the file.
    """

    def __init__(self, source: str, part: Part, cache: ChunkCache = ChunkCache()) -> None:
        self.source, self.part, self.cache = source, part, cache
        self.folder = local_folder(source, cache, read_prepared(source, cache)) / part
        self.chunks = self._listed()
        self.sizes: list[int] = [chunk["chunk_size"] for chunk in self.chunks]
        self._ends = np.cumsum(self.sizes)
        self._first = [0, *accumulate(self.sizes)]
        self._open: OrderedDict[int, Mapped] = OrderedDict()
        self._litdata: tuple[int, Any] = (0, None)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_litdata": (0, None)}

    def read(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The samples at `indices`, stacked, in that order: tensors (B, ...), label int64 (B,)."""
        index = np.asarray(indices)
        owner = np.searchsorted(self._ends, index, side="right")
        samples: list[dict[str, Any]] = [{} for _ in indices]
        for place in np.argsort(owner, kind="stable").tolist():
            samples[place] = self._sample(int(owner[place]), int(index[place]))
        return {name: _stack([sample[name] for sample in samples]) for name in samples[0]}

    def _sample(self, chunk: int, index: int) -> dict[str, Any]:
        content, offsets = self._opened(chunk)
        inside = index - self._first[chunk]
        item = content[offsets[inside] : offsets[inside + 1]]
        sample: dict[str, Any] = self._config()._item_loader.deserialize(item)
        return sample

    def _opened(self, chunk: int) -> Mapped:
        if chunk not in self._open:
            self._open[chunk] = self._map(chunk)
        self._open.move_to_end(chunk)
        if len(self._open) > OPEN_CHUNKS:
            self._open.popitem(last=False)
        return self._open[chunk]

    def _map(self, chunk: int) -> Mapped:
        path, began = self.folder / self.chunks[chunk]["filename"], time.monotonic()
        while True:
            try:
                self._fetch(chunk, path)
                check_chunk(path, self.chunks[chunk])
                content = memoryview(np.memmap(path, np.uint8, "c"))  # type: ignore[arg-type]
                return content, np.frombuffer(content, np.uint32, self.sizes[chunk] + 1, 4).tolist()
            except (FileNotFoundError, MissingChunkError):  # another process may have trimmed the cache
                if not is_remote(self.source):
                    raise
                _wait(began, path)

    def _fetch(self, chunk: int, path: Path) -> None:
        if not is_remote(self.source):
            return
        began = time.monotonic()
        while not path.exists():  # another process of this machine may hold the lock
            self._config().download_chunk_from_index(chunk, skip_lock=True)
            if not path.exists():
                _wait(began, path)
        os.utime(path)
        self.cache.trim(self.folder.parent, path)

    def _config(self) -> Any:
        """litdata's, one for each process: connections do not survive a fork."""
        if self._litdata[0] != os.getpid():
            far = f"{self.source.rstrip('/')}/{self.part}" if is_remote(self.source) else None
            serializers = litdata().streaming.serializers._get_serializers(None)
            config = litdata().streaming.config.ChunksConfig(str(self.folder), serializers, far)
            self._litdata = (os.getpid(), config)
        return self._litdata[1]

    def _listed(self) -> list[dict[str, Any]]:
        if is_remote(self.source):
            fetch(f"{self.source.rstrip('/')}/{self.part}", INDEX, self.folder)
        chunks: list[dict[str, Any]] = read_json(self.folder / INDEX)["chunks"]
        if not is_remote(self.source):
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}
            wrong = next((c for c in chunks if sizes.get(c["filename"]) != c["chunk_bytes"]), None)
            check_chunk(self.folder / (wrong or chunks[0])["filename"], wrong or chunks[0])
        return chunks


def _wait(began: float, path: Path) -> None:
    if time.monotonic() - began > WAIT_SECONDS:
        raise TimeoutError(f"{path} was not there after {WAIT_SECONDS:.0f} s: is the bucket within reach?")
    time.sleep(POLL_SECONDS)


def _stack(values: list[Any]) -> Tensor:
    return torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values)


def read_prepared(source: str, cache: ChunkCache = ChunkCache()) -> Prepared:
    """What is in a prepared folder or bucket.

    Raises:
        FileNotFoundError: if nothing was prepared there.
        ValueError: if it is not whole, or of another version.
    """
    content = _manifest(source, cache)
    if content.get("version") != VERSION:
        raise ValueError(
            f"{MANIFEST} in {source} is of another version than {VERSION}: prepare the data again."
        )
    content.update(shape=tuple(content["shape"]), classes=tuple(content["classes"]))
    return Prepared(**content)


def _manifest(source: str, cache: ChunkCache) -> dict[str, Any]:
    """Of a bucket fetched each time: it may have been prepared anew."""
    if is_remote(source):
        cache.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.root, prefix=".fetching-") as fresh:
            fetch(source.rstrip("/"), MANIFEST, Path(fresh))
            return read_json(Path(fresh) / MANIFEST)
    if not (Path(source) / MANIFEST).is_file():
        refuse_unfinished(Path(source))
    return read_json(Path(source) / MANIFEST)


def refuse_unfinished(folder: Path) -> None:
    """Say why there is no manifest."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: give the folder that `prepare` wrote.")
    if list(folder.glob("training/chunk-*.bin")):
        raise ValueError(f"{folder} is not whole, {MANIFEST} is missing: the writing was stopped; {_AGAIN}")
    raise FileNotFoundError(f"{folder} holds no {MANIFEST}: give the folder that `prepare` wrote.")


def local_folder(source: str, cache: ChunkCache, prepared: Prepared) -> Path:
    """Where the files are, or come to be, on this machine."""
    if not is_remote(source):
        return Path(source)
    return cache.folder_of(prepared.content or f"{hash_seed(source, prepared):016x}")


def fetch(remote: str, name: str, folder: Path) -> None:
    """One small file of a bucket; refuses a bucket without it."""
    folder.mkdir(parents=True, exist_ok=True)
    began, downloader = (
        time.monotonic(),
        litdata().streaming.downloader.get_downloader(remote, str(folder), []),
    )
    while not (folder / name).exists():
        try:
            downloader.download_file(f"{remote}/{name}", str(folder / name))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{remote} holds no {name}: upload the whole folder that `prepare` wrote."
            ) from error
        if not (folder / name).exists():
            _wait(began, folder / name)


def read_json(path: Path) -> dict[str, Any]:
    """A file of ours or litdata's; refuses a broken one by name."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: files were lost; {_AGAIN}") from error
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}): remove it, and {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is broken (no object): remove it, and {_AGAIN}")
    return content


def check_chunk(path: Path, listed: dict[str, Any]) -> None:
    """Refuse a chunk that is missing, cut off, or has not as many samples as the index says."""
    if not path.is_file():
        raise MissingChunkError(f"{path} is missing, {INDEX} lists it: files were lost; {_AGAIN}")
    size, samples = path.stat().st_size, samples_in(path)
    if (size, samples) != (listed["chunk_bytes"], listed["chunk_size"]):
        raise ValueError(
            f"{path} is broken: found {size} bytes and {samples} samples, {INDEX} lists {listed['chunk_bytes']} and "
            f"{listed['chunk_size']}. Remove it, and {_AGAIN}"
        )
