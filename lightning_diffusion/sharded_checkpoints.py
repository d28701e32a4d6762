"""Sharded checkpoints: folders of torch.distributed.checkpoint, written by all processes and readable on any number.

    .metadata, __RANK_N.distcp   `state_dict`, `optimizer_0`, ... and sharded tensors of callbacks, under `shards`
    meta.pt                      all else that an ordinary checkpoint holds; written last: without it the folder is
                                 unfinished

This is what Lightning's ModelParallelStrategy writes; `shards` are our own. Reading executes no code of the folder's.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.tensor import DTensor

META, INDEX, SHARDS = "meta.pt", ".metadata", "shards"
_SEPARATOR = "/"


class _Index(pickle.Unpickler):
    """Of what shards' index is made, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """A class that is allowed."""
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name in _OF_INDEX.get(module.removeprefix("torch.distributed.checkpoint."), ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _member(kind: Any, name: str) -> Enum:
    """Of an enumeration: some Pythons (3.11.0 to 3.11.3) pickle it as getattr(kind, name)."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"it asks {kind} for {name}")
    return kind[name]


class Reader(FileSystemReader):
    """Reads the index without running what it names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index."""
        with (Path(self.path) / INDEX).open("rb") as file:
            metadata: Metadata = _Index(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    """Plain data only, besides tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put what is no tensor where it belongs."""
        found, name = torch.load(value, weights_only=True), read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], found)


class _WholePlanner(_Planner, _EmptyStateDictLoadPlanner):
    """Everything that is stored."""


def load_into(state: dict[str, Any], path: Path) -> None:
    """Fill a state dict's tensors, sharded or not, on all processes together."""
    load_shards(state, storage_reader=Reader(path), planner=_Planner())


def is_sharded_checkpoint(path: str | Path) -> bool:
    """Whether there is a sharded checkpoint, whole or not."""
    return (Path(path) / META).is_file() or (Path(path) / INDEX).is_file()


_PATHS = frozenset(("Path", "PosixPath", "PurePosixPath", "WindowsPath"))

_OF_INDEX = {
    "metadata": frozenset(
        (
            "Metadata",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "MetadataIndex",
        )
    ),
    "filesystem": frozenset(("_StorageInfo",)),
    "torch": frozenset(
        str(x).removeprefix("torch.") for x in vars(torch).values() if isinstance(x, torch.dtype)
    )
    | {"Size"},
    "torch.serialization": frozenset(("_get_layout",)),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}


def check_whole(path: Path) -> Metadata:
    """What a sharded checkpoint holds.

    Raises:
        ValueError: if files are missing or shorter than they were written.
    """
    missing = [name for name in (INDEX, META) if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} is unfinished: it lacks {' and '.join(missing)}. {_ANOTHER}")
    try:
        metadata = Reader(path).read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(f"{path / INDEX} is truncated or no index of shards: {error}. {_ANOTHER}") from error
    ends: dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found is None or found < end:
            said = "is missing" if found is None else f"has {found} of {end} bytes"
            raise ValueError(f"{path} is damaged: the shard {name} {said}. {_ANOTHER}")
    return metadata


_ANOTHER = "Use another checkpoint of the run"


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor that is stored, by its full name, without its values (on the meta device)."""
    found = check_whole(path).state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def stored_state_dict(path: Path) -> dict[str, Tensor]:
    """Names and shapes of the module's state dict, on the meta device."""
    return within(stored_tensors(path), "state_dict.")


def within(named: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}


def consolidated(path: str | Path, optimizers: bool = True) -> dict[str, Any]:
    """The checkpoint in one piece, on the CPU, as a run on one device would have written it.

    Args:
        path: folder of the checkpoint.
        optimizers: with their states, which drawing samples needs not.

    Raises:
        ValueError: if it is not whole.
    """
    path = Path(path)
    check_whole(path)
    loaded: dict[str, Any] = {}
    wanted = None if optimizers else {"state_dict", SHARDS}
    planner = _WholePlanner(wanted)  # type: ignore[no-untyped-call]
    _load_state_dict(loaded, storage_reader=Reader(path), planner=planner, no_dist=True)
    checkpoint = read_meta(path)
    put_back_(checkpoint, loaded.get(SHARDS, {}))
    checkpoint["state_dict"] = loaded["state_dict"]
    found = (loaded.get(f"optimizer_{i}") for i in range(len(loaded)))
    states = [numbered(state) for state in found if state is not None]
    return {**checkpoint, "optimizer_states": states} if states else checkpoint


def read_meta(path: Path) -> dict[str, Any]:
    """All that is not sharded: tensors and plain data."""
    checkpoint: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
    return checkpoint


def numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state by parameters' names as one by their numbers, as optimizers themselves have it."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    groups = [{**group, "params": [number[n] for n in group["params"]]} for group in state["param_groups"]]
    values = {number[name]: dict(x) for name, x in state.get("state", {}).items()}
    return {"state": values, "param_groups": groups}


def named(state: Mapping[str, Any], groups: list[list[str]]) -> dict[str, Any]:
    """An optimizer's state by numbers as one by names; `groups` are the names of its parameters.

    Raises:
        ValueError: if the state is of another number of parameters.
    """
    saved = [list(group["params"]) for group in state["param_groups"]]
    if [len(group) for group in saved] != [len(group) for group in groups]:
        raise ValueError(
            f"The checkpoint's optimizer has groups of {[len(g) for g in saved]} parameters, this run's has "
            f"{[len(g) for g in groups]}. Resume with the optimizer of that run, or begin a new run from its weights."
        )
    pairs = zip(saved, groups, strict=True)
    name = {n: new for old, own in pairs for n, new in zip(old, own, strict=True)}
    values = {name[number]: x for number, x in state["state"].items()}
    own_groups = [
        {**g, "params": list(names)} for g, names in zip(state["param_groups"], groups, strict=True)
    ]
    return {"state": values, "param_groups": own_groups}


def take_shards_(checkpoint: dict[str, Any]) -> dict[str, DTensor]:
    """Take sharded tensors out of all but the state dict, by where they were: `callbacks/EMA/...`."""
    return dict(_taken({key: value for key, value in checkpoint.items() if key != "state_dict"}, ()))


def _taken(tree: dict[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, DTensor]]:
    for name, value in list(tree.items()):
        if isinstance(value, dict):
            yield from _taken(value, (*above, str(name)))
        elif isinstance(value, DTensor):
            yield _SEPARATOR.join((*above, str(name))), tree.pop(name)


def put_back_(checkpoint: dict[str, Any], shards: Mapping[str, Tensor]) -> None:
    """Put tensors back to where `take_shards_` found them."""
    for place, value in shards.items():
        *above, name = place.split(_SEPARATOR)
        tree = checkpoint
        for key in above:
            tree = tree.setdefault(key, {})
        tree[name] = value
