"""Sharding a DiffusionModule over processes (FSDP2), block by block, on a mesh on which no two train apart.

A network's blocks are gathered one after the other, what is in no block as a whole. A learned weighting, which is
outside of the network, is sharded too, so that its gradients are averaged as all others are.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lightning_diffusion.activation_checkpointing import blocks_of
from lightning_diffusion.precision import DiffusionFSDPPrecision
from lightning_diffusion.weightings import Uncertainty


def shard_under_strategy_(module: LightningModule) -> None:
    """Shard a module with a `network`, in its configure_model, under ModelParallelStrategy; does nothing elsewhere.

    Raises:
        ValueError: for a mesh on which processes would train apart; for parameters that would.
    """
    trainer = module._trainer
    if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy) or is_sharded(module):
        return
    _refuse_tensor_parallel(trainer.strategy.device_mesh)
    _shard_(module, trainer.strategy.device_mesh["data_parallel"], trainer.precision_plugin)
    refuse_unsharded(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether any part is sharded by FSDP2."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def refuse_unsharded(module: nn.Module) -> None:
    """Refuse trained parameters that are whole on every process: nothing would average their gradients."""
    named = module.named_parameters()
    whole = [name for name, p in named if p.requires_grad and not isinstance(p, DTensor)]
    if whole:
        raise ValueError(
            f"{whole[0]!r} and {len(whole) - 1} other trained parameters are not sharded, so every process would train "
            "its own. Shard their modules in configure_model by torch.distributed.fsdp.fully_shard, or freeze them."
        )


def _shard_(module: Any, mesh: DeviceMesh, precision: object) -> None:
    blocks = [block for block in blocks_of(module.network) if any(True for _ in block.parameters())]
    learned = [part for part in module.modules() if isinstance(part, Uncertainty)]
    if isinstance(precision, DiffusionFSDPPrecision):
        precision.shard_(module, mesh, blocks, learned)
    else:
        for part in [*blocks, module.network, *learned]:
            if not isinstance(part, FSDPModule):
                fully_shard(part, mesh=mesh)
    for part in learned:
        register_fsdp_forward_method(part, "combine")


def _refuse_tensor_parallel(mesh: DeviceMesh) -> None:
    data, tensor = mesh["data_parallel"].size(), mesh["tensor_parallel"].size()
    if tensor > 1:
        raise ValueError(
            f"Found data_parallel_size={data} and tensor_parallel_size={tensor} (Lightning's default is one group per "
            f"machine): there is no plan that splits tensors, so the {tensor} processes of a group would train apart "
            f"on the same data, in silence. Use FSDP2Strategy, or data_parallel_size={data * tensor} and "
            "tensor_parallel_size=1."
        )
