"""Run by torchrun on two processes: shards computing in bfloat16, with islands, against float32 in one piece."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from precision_recorder import Recorder
from small_module import network
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import lightning_diffusion as ld
from lightning_diffusion.callbacks import PrecisionAudit
from lightning_diffusion.datamodules import DigitsDataModule

F32, BF16 = {torch.float32}, {torch.bfloat16}


class Sharded(ld.DiffusionModule):
    """Shards itself as the documentation says; records its second step."""

    def configure_model(self) -> None:
        blocks = [*self.network.down, self.network.middle, *self.network.up]
        self.trainer.precision_plugin.shard_(self, self.device_mesh["data_parallel"], blocks)

    def training_step(self, batch, batch_idx):
        self.recorder = Recorder(self)
        with self.recorder:
            return super().training_step(batch, batch_idx)

    def backward(self, loss, *args) -> None:
        with self.recorder:
            super().backward(loss, *args)

    def on_before_optimizer_step(self, optimizer) -> None:
        self.gradients = {name: p.grad.full_tensor() for name, p in self.network.named_parameters()}

    def on_train_end(self) -> None:
        self.states = {
            s.dtype for state in self.optimizers().state.values() for s in state.values() if s.ndim
        }


class Float32(Sharded):
    """In float32 all through."""

    def configure_model(self) -> None:
        if not isinstance(self.network, FSDPModule):
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


def trained(kind, **options):
    """After one step of 2 x 8 images, by networks whose every layer has a gradient."""
    net = network()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    quiet |= {"use_distributed_sampler": False, "accelerator": "cpu", "devices": 2, "max_steps": 1}
    model = kind(network=net)
    trainer = L.Trainer(strategy=strategy, **quiet, **options)
    trainer.fit(model, datamodule=DigitsDataModule(8))
    return model


def main(_: Path) -> None:
    model = trained(Sharded, plugins=[ld.DiffusionFSDPPrecision(fp32_modules=["network.head"])])
    of = model.recorder.of
    assert of("convolution", "conv") == BF16, of("convolution", "conv")
    assert of("convolution", "head") == F32
    assert of("group_norm") == F32
    assert of("addmm", "embedding") == F32
    assert of("reduce_scatter") == F32, sorted({op for _, op in model.recorder.types if "_" in op})
    assert of("allgather") == F32 | BF16, of("allgather")
    assert all(isinstance(p, DTensor) and p.dtype is torch.float32 for p in model.network.parameters())
    assert model.states == F32
    expected = trained(Float32).gradients
    assert model.gradients.keys() == expected.keys()
    for name, gradient in model.gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, (name, float(error))
    assert any(not torch.equal(model.gradients[name], expected[name]) for name in expected)
    audit = PrecisionAudit(1, write=False)
    trained(Sharded, plugins=[ld.DiffusionFSDPPrecision()], callbacks=[audit])
    assert audit.report is not None
    assert audit.report.findings == (), audit.report.findings
