"""Run by torchrun: a small job under FSDP2, saved as shards, or gone on from them on another number of processes."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.activation_checkpointing import Recomputed, blocks_of
from lightning_diffusion.callbacks import (
    ActivationCheckpointing,
    GradientClipping,
    LastCheckpoint,
    PowerFunctionEMA,
    SampleGrid,
)
from lightning_diffusion.datamodules import DigitsDataModule

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
QUIET |= {"limit_val_batches": 0, "num_sanity_val_steps": 0, "use_distributed_sampler": False}


def module():
    L.seed_everything(1, verbose=False)
    network = ld.UNet((1, 8, 8), channels=8, num_blocks=1, attention_levels=[], num_classes=10)
    return ld.DiffusionModule(network, ld.EDM2(), ld.Standardize(), sampler=ld.Euler(2))


class Seen(L.Callback):
    """Which images were trained on, over all processes."""

    def __init__(self) -> None:
        self.images: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        images = batch["image"].flatten(1)
        parts = trainer.strategy.all_gather(images)
        assert trainer.world_size == 1 or not torch.equal(parts[0], parts[1])
        self.images.append(parts.reshape(-1, images.shape[1]) if trainer.world_size > 1 else images)


def fit(model, folder, steps, processes, *callbacks, strategy=None, **options):
    ema, seen = PowerFunctionEMA(0.1), Seen()
    trainer = L.Trainer(
        strategy=strategy or ld.FSDP2Strategy(), devices=processes, max_steps=steps, max_epochs=9,
        callbacks=[ema, seen, GradientClipping(), LastCheckpoint(100, folder), *callbacks],
        default_root_dir=folder, **QUIET,
    )  # fmt: skip
    trainer.fit(model, datamodule=DigitsDataModule(32 // processes), **options)
    return trainer, ema, seen


def begin(folder: Path, processes: int) -> None:
    """Six steps, of which all that matters is kept in whole.pt."""
    model = module()
    grid = SampleGrid(6, rows=3, columns=1, scale=1)
    trainer, ema, seen = fit(model, folder, 6, processes, ActivationCheckpointing(), grid)
    blocks = blocks_of(model.network)
    assert all(isinstance(part, FSDPModule) for part in [*blocks, model.network])
    assert all(isinstance(block.forward, Recomputed) for block in blocks)
    assert all(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
    assert all(isinstance(x, DTensor) for x in ema._running.averages["ema"].values())
    kept = {name: x.full_tensor() for name, x in ema._running.averages["ema"].items()}
    drawn = {name: model.sample(2, weights=name) for name in ("online", "ema")}
    with ema.average_parameters(model):
        assert_close(model.sample(2), drawn["ema"], rtol=0, atol=0)
    assert not torch.equal(drawn["online"], drawn["ema"])
    if trainer.is_global_zero:
        torch.save({"ema": kept, "seen": torch.cat(seen.images), "drawn": drawn["ema"]}, folder / "whole.pt")
    refuse_groups_that_train_apart(folder)


def refuse_groups_that_train_apart(folder: Path) -> None:
    """Lightning's default mesh on one machine is one group of tensor parallelism."""
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 .*train apart.*Use FSDP2Strategy"):
        fit(module(), folder / "apart", 1, 2, strategy=ModelParallelStrategy(process_group_backend="gloo"))


def go_on(folder: Path, processes: int) -> None:
    """Four more steps, on the images that come next."""
    model, before = module(), torch.load(folder / "whole.pt")
    trainer, ema, seen = fit(model, folder / "on", 10, processes, ckpt_path=folder / "last.ckpt")
    everything = torch.cat([before["seen"], torch.cat(seen.images)])
    assert len(everything) == len(everything.unique(dim=0)) == 320, len(everything)
    averages = ema._running.averages["ema"]
    assert all(model.averages["ema"][name] is x for name, x in averages.items())
    moved = [not torch.equal(x.full_tensor(), before["ema"][name]) for name, x in averages.items()]
    assert any(moved)
    assert trainer.global_step == 10
    assert ema._running.steps == 10


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"begin": begin, "go_on": go_on}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
