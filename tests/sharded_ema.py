"""Run by torchrun on two processes: averages of sharded parameters against the gathered definition."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from foreign import Classifier, points
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from lightning_diffusion.callbacks import EMA, PowerFunctionEMA


def whole(x: torch.Tensor) -> torch.Tensor:
    """Gathered; a forward without backward leaves parameters gathered already."""
    return (x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()).clone()


class Sharded(Classifier):
    """Layers of five rows: three on one process, two on the other."""

    def configure_model(self) -> None:
        if not isinstance(self.head.weight, DTensor):
            self.body[3].weight = torch.nn.Parameter(self.body[3].weight.detach().clone())
            mesh = self.device_mesh["data_parallel"]
            for part in (self.body, self.head, self.frozen):
                fully_shard(part, mesh=mesh)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)

    def on_validation_epoch_end(self) -> None:
        self.seen.append(whole(self.head.weight))


class Definition(L.Callback):
    """The average of the gathered weights."""

    def on_fit_start(self, trainer, pl_module) -> None:
        self.average = self.gather(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        for name, now in self.gather(pl_module).items():
            self.average[name].lerp_(now, 0.1)

    def gather(self, pl_module) -> dict[str, torch.Tensor]:
        return {n: whole(p) for n, p in pl_module.named_parameters() if p.requires_grad}


def fit(module: L.LightningModule, *callbacks: L.Callback, steps: int, **options) -> L.Trainer:
    strategy = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=False,
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=steps,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.fit(module, points(16), points(8), **options)
    return trainer


def main(folder: Path) -> None:
    """Average, evaluate, save, resume."""
    module, ema, definition = Sharded(), EMA(0.9), Definition()
    trainer = fit(module, ema, definition, steps=4)
    own = ema._running.averages["ema"]
    assert all(isinstance(shadow, DTensor) for shadow in own.values())
    rows = len(own["body.0.weight"].to_local())
    assert rows == (3 if trainer.global_rank == 0 else 2), rows
    assert_close(ema.state_dict()["averages"]["ema"], definition.average)
    assert_close(module.seen[-1], definition.average["head.weight"])
    trainer.save_checkpoint(folder / "half.ckpt")
    saved = torch.load(folder / "half.ckpt", weights_only=True)
    assert_close(saved["callbacks"]["EMA"]["averages"]["ema"], definition.average)
    assert_close(saved["state_dict"]["head.weight"], whole(module.head.weight))

    straight, resumed, a, b = Sharded(), Sharded(), PowerFunctionEMA(0.2), PowerFunctionEMA(0.2)
    fit(straight, a, steps=8)
    half = fit(Sharded(), PowerFunctionEMA(0.2), steps=4)
    half.save_checkpoint(folder / "power.ckpt")
    fit(resumed, b, steps=8, ckpt_path=folder / "power.ckpt")
    assert_close(b.state_dict()["averages"], a.state_dict()["averages"], rtol=0, atol=0)
    assert b.state_dict()["clocks"] == a.state_dict()["clocks"]
