"""Files that are either there, whole, or not there: atomic writes, checkpoints, run folders.

A file, or a folder of shards, is written beside its target as `.NAME.HOST.PID.tmp`, flushed to the disk, then
renamed; what a killed process left is swept by the next write into that folder. A run folder holds config.yaml,
metrics.csv, samples/ and checkpoints/last.ckpt.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import platform
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from lightning_diffusion.sharded_checkpoints import consolidated, is_sharded_checkpoint

CHECKPOINTS, LAST = "checkpoints", "last.ckpt"


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears under `path` only when it is whole and on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    with temporary_beside(path) as temporary:
        with open(temporary, "wb") as file:
            write(file)
        publish(temporary, path)


@contextlib.contextmanager
def filled_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` whose entries move there, in place of those of their names, once all are written."""
    unfinished = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        folder.mkdir(exist_ok=True)
        for entry in unfinished.iterdir():
            shutil.rmtree(folder / entry.name, ignore_errors=True)
            os.replace(entry, folder / entry.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A name in the folder of `path`, of this process alone; whatever has it afterwards is removed."""
    temporary = temporary_name(path)
    try:
        yield temporary
    finally:
        _remove(temporary)


def temporary_name(path: Path) -> Path:
    """Beside `path`, of this process alone."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Move a finished file or folder to its place, so that neither it nor what it replaces is lost on the way."""
    _flush(temporary)
    before = _aside(path)
    if is_sharded_checkpoint(path) or (temporary.is_dir() and path.is_file()):
        _remove(before)
        os.replace(path, before)
    os.replace(temporary, path)
    _flush(path.parent)
    _remove(before)


def settle(path: Path) -> None:
    """Put back what a process that was killed right in `publish` had moved aside: a folder is not replaced at once."""
    if not path.exists() and _aside(path).exists():
        os.replace(_aside(path), path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.before")


def flush_folder(folder: Path) -> None:
    """All files in it to the disk."""
    for file in folder.iterdir():
        _flush(file)


def sweep(folder: Path) -> None:
    """Remove temporary files of processes of this machine that are gone."""
    pattern = re.compile(rf"\..+\.{re.escape(_host())}\.(\d+)\.tmp")
    for file in folder.iterdir():
        match = pattern.fullmatch(file.name)
        if match and not _is_alive(int(match[1])):
            _remove(file)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host() -> str:
    return platform.node() or "localhost"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints in one file each, written atomically in the target folder; errors surface.

    Use it as `Trainer(plugins=[AtomicCheckpointIO()])`, as the command line does.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Write `checkpoint` to `path`; a path with a protocol (s3://...) goes Lightning's way."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            with _naming_full_disk(path):
                write_atomically(path, partial(torch.save, checkpoint))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint at `path`, a file or shards; by default only tensors and plain data."""
        if is_sharded_checkpoint(path):
            return consolidated(path)
        with _readable(path):
            return super().load_checkpoint(path, map_location, weights_only)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint of a run folder, a file or shards, on the CPU; tensors and plain data only."""
    file = checkpoint_of(path)
    if file.is_dir():
        return consolidated(file)
    with _readable(file):
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{file} holds a {type(checkpoint).__name__}, not a checkpoint: give one that fit wrote"
        )
    return checkpoint


def checkpoint_of(path: str | Path) -> Path:
    """The checkpoint itself, a file or a folder of shards, or of a run folder the last one."""
    path = Path(path)
    settle(path)
    if path.is_file() or is_sharded_checkpoint(path):
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: give a checkpoint, or the run folder that holds it")
    last = path / CHECKPOINTS / LAST
    settle(last)
    files = [last] if last.exists() else [*(path / CHECKPOINTS).glob("*.ckpt"), *path.glob("*.ckpt")]
    if not files:
        raise FileNotFoundError(f"{path} holds no checkpoint: expected {last}; has this run saved one yet?")
    return max(files, key=lambda file: file.stat().st_mtime)


def run_folder_of(path: str | Path) -> Path | None:
    """The run folder that `path`, a run folder or a checkpoint in one, belongs to."""
    if not Path(path).exists():
        return None
    is_folder = Path(path).is_dir() and not is_sharded_checkpoint(path)
    folder = Path(path) if is_folder else Path(path).parent
    candidates = [folder, folder.parent] if folder.name == CHECKPOINTS else [folder]
    return next((candidate for candidate in candidates if (candidate / "config.yaml").is_file()), None)


def folder_of(trainer: Any) -> Path:
    """Where a Trainer's run writes, known to the first process; `trainer.log_dir` would wait for all processes."""
    logger = trainer.loggers[0] if trainer.loggers else None
    known = (getattr(logger, "log_dir", None), getattr(logger, "save_dir", None), trainer.default_root_dir)
    return Path(next(folder for folder in known if folder))


def refuse_other_weights(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str | Path
) -> None:
    """Refuse a state dict that another network wrote, naming what differs, before anything is overwritten."""
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = {name: (state[name].shape, expected[name].shape) for name in state.keys() & expected.keys()}
    resized = [f"{name} {tuple(a)}, here {tuple(b)}" for name, (a, b) in sorted(shapes.items()) if a != b]
    found = {"missing": missing, "not in this network": unexpected, "of another shape": resized}
    said = [f"{len(names)} tensors {what} (first: {names[0]})" for what, names in found.items() if names]
    if said:
        raise ValueError(
            f"{origin} is of another network: {'; '.join(said)}. Use the configuration of its run"
        )


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits, of names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _naming_full_disk(path: str | Path) -> Iterator[None]:
    """torch tells of a full disk as of a wrong position in the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        said = f"the disk is full ({os.strerror(cause.errno)}): free some space and resume the run; "
        raise OSError(cause.errno, f"{said}the checkpoint before is whole", str(path)) from error


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise ValueError(_unreadable(path, "it has no end"))
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else "pickled objects"
        raise ValueError(
            f"{path} holds {what}: only tensors and plain data are read, others may run code"
        ) from error
    except RuntimeError as error:
        raise ValueError(_unreadable(path, str(error).splitlines()[0])) from error


def _unreadable(path: str | Path, why: str) -> str:
    size = os.path.getsize(path)
    return f"{path} ({size} bytes) is truncated or no checkpoint: {why}. Use another checkpoint of the run"


def new_run_folder(name: str, root: str | Path = "runs") -> Path:
    """Make and return `root/name-n`, n one above those that are there."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    taken = [re.fullmatch(rf"{re.escape(name)}-(\d+)", entry.name) for entry in root.iterdir()]
    number = max((int(match[1]) for match in taken if match), default=0) + 1
    try:
        (root / f"{name}-{number}").mkdir()
    except FileExistsError:
        return new_run_folder(name, root)
    return root / f"{name}-{number}"


def keep_earlier(path: str | Path) -> Path | None:
    """Rename `metrics.csv`, if it is there, to the next free `metrics-n.csv`; returns the new name."""
    path = Path(path)
    if not path.exists():
        return None
    names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, 1_000_000))
    kept = next(name for name in names if not name.exists())
    return path.rename(kept)
