"""FSDP2 as a strategy of the Trainer: Lightning's ModelParallelStrategy for data parallelism alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import default_pg_timeout
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_diffusion.io import flush_folder, publish, refuse_other_weights, sweep, temporary_name
from lightning_diffusion.io import load_checkpoint as load_file
from lightning_diffusion.sharded_checkpoints import (
    META,
    SHARDS,
    is_sharded_checkpoint,
    load_into,
    named,
    put_back_,
    read_meta,
    stored_tensors,
    take_shards_,
    within,
)
from lightning_diffusion.sharding import refuse_unsharded
from lightning_diffusion.swapping import placed_like


class FSDP2Strategy(ModelParallelStrategy):
    """Every process keeps its shard of parameters, gradients, optimizer state and averages (FSDP2).

    One mesh of all processes: none trains apart. Checkpoints are written sharded, each process its part, atomically,
    and go on on any number of processes and under any strategy; ordinary ones can be gone on from as well.

    Args:
        save_distributed_checkpoint: shards in a folder; False gathers everything into one file.
        process_group_backend: nccl on GPUs and gloo on CPUs, if not given.
        timeout: after which a process that waits for others gives up.
    """

    writes_shards = True

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size

    def setup(self, trainer: Trainer) -> None:
        """As Lightning does, for a module that shards all that it trains."""
        super().setup(trainer)
        if self.model is not None:
            refuse_unsharded(self.model)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object | None = None
    ) -> None:
        """Write a folder of shards, or a file, that appears when it is whole."""
        path, shards = Path(self.broadcast(filepath)), take_shards_(checkpoint)
        if self._save_distributed_checkpoint:
            self._write(path, checkpoint, shards)
            return
        put_back_(checkpoint, {place: x.full_tensor().cpu() for place, x in shards.items()})
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    def _write(self, path: Path, checkpoint: dict[str, Any], shards: Mapping[str, DTensor]) -> None:
        temporary = self.broadcast(temporary_name(path))
        states = {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        state = {"state_dict": checkpoint.pop("state_dict"), **states, SHARDS: dict(shards)}
        self._on_first(lambda: _prepare(temporary))
        self._together(lambda: save_shards(state, checkpoint_id=temporary), temporary)
        self._on_first(lambda: _finish(checkpoint, temporary, path))

    def _on_first(self, act: Any) -> None:
        """Do something on the first process; its error is everybody's."""
        error: Exception | None = None
        if self.is_global_zero:
            try:
                act()
            except OSError as found:
                error = found
        said = self.broadcast(None if error is None else f"{type(error).__name__}: {error}")
        if said is not None:
            raise OSError(f"no checkpoint was written: {said}") from error

    def _together(self, act: Any, temporary: Path) -> None:
        try:
            act()
        except CheckpointException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"no checkpoint was written: {_first_failure(error)}") from error

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a sharded or an ordinary checkpoint, of any number of processes, into the shards of this one."""
        path = Path(self.broadcast(checkpoint_path))
        return self._load_shards(path) if is_sharded_checkpoint(path) else self._load_whole(path)

    def _load_shards(self, path: Path) -> dict[str, Any]:
        stored, module = stored_tensors(path), self._module
        state = _with_sizes_of(get_model_state_dict(module), within(stored, "state_dict."), path)
        _load({"state_dict": state}, path)
        module.load_state_dict(state, strict=self._strict)
        for i, optimizer in enumerate(self.optimizers):
            _refuse_without_optimizer(any(name.startswith(f"optimizer_{i}.") for name in stored), path)
            own = {f"optimizer_{i}": get_optimizer_state_dict(module, optimizer)}
            _load(own, path)
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(
                module, optimizer, optim_state_dict=own[f"optimizer_{i}"], options=options
            )
        checkpoint = read_meta(path)
        shards = _like_parameters(within(stored, f"{SHARDS}."), module)
        _load({SHARDS: shards}, path)
        put_back_(checkpoint, shards)
        return {**checkpoint, "state_dict": state}

    def _load_whole(self, path: Path) -> dict[str, Any]:
        checkpoint, module = load_file(path), self._module
        own = module.state_dict()
        _with_sizes_of(own, checkpoint["state_dict"], path)
        state = {name: placed_like(x, own.get(name, x)) for name, x in checkpoint["state_dict"].items()}
        module.load_state_dict(state, strict=self._strict)
        for i, optimizer in enumerate(self.optimizers):
            _refuse_without_optimizer(len(checkpoint.get("optimizer_states", [])) > i, path)
            saved = named(checkpoint["optimizer_states"][i], _names(module, optimizer))
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
            set_optimizer_state_dict(module, optimizer, optim_state_dict=saved, options=options)
        return checkpoint

    @property
    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @property
    def _strict(self) -> bool:
        return self.lightning_module is None or self.lightning_module.strict_loading


def _prepare(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    sweep(temporary.parent)
    temporary.mkdir()


def _finish(checkpoint: dict[str, Any], temporary: Path, path: Path) -> None:
    try:
        torch.save(checkpoint, temporary / META)
        flush_folder(temporary)
        publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(state: dict[str, Any], path: Path) -> None:
    try:
        load_into(state, path)
    except CheckpointException as error:
        raise ValueError(
            f"{path} cannot be read here: {_first_failure(error)}. Resume with the network and the optimizer of its "
            "run, or use another checkpoint."
        ) from error


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"{type(cause).__name__} on process {rank}: {cause}"


def _with_sizes_of(own: Mapping[str, Any], stored: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """A module's state dict with buffers as long as they were saved, such as a deviation per channel."""
    parameters = {name: x for name, x in own.items() if isinstance(x, DTensor)}
    kept = {name: x for name, x in stored.items() if name in parameters or name not in own}
    refuse_other_weights(kept, parameters, path)
    return {
        name: x
        if name in parameters or name not in stored or x.shape == stored[name].shape
        else torch.empty(stored[name].shape, dtype=x.dtype, device=x.device)
        for name, x in own.items()
    }


def _like_parameters(stored: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Room for shards of callbacks, each as the parameter of its name is sharded."""
    parameters = dict(module.named_parameters())
    return {place: _room(x, parameters.get(place.rpartition("/")[2])) for place, x in stored.items()}


def _room(stored: Tensor, parameter: Tensor | None) -> Tensor:
    if isinstance(parameter, DTensor) and parameter.shape == stored.shape:
        return torch.empty_like(parameter.detach(), dtype=stored.dtype)
    return torch.empty(stored.shape, dtype=stored.dtype)


def _names(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    name = {id(p): name for name, p in module.named_parameters()}
    return [[name[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _refuse_without_optimizer(holds: bool, path: Path) -> None:
    if not holds:
        raise ValueError(
            f"{path} holds no state of the optimizer: it was written with save_weights_only=True, and a run cannot go "
            "on from it. Resume from another checkpoint, or begin a new run from its weights."
        )
