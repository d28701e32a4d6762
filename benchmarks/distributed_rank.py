"""One process of `benchmarks/distributed.py`: trains on its share of the digits, and writes down what it saw."""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rank_failures import Numbered
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

import lightning_diffusion as ld
from lightning_diffusion.averager import whole
from lightning_diffusion.callbacks import (
    ActivationCheckpointing,
    GradientClipping,
    LastCheckpoint,
    PowerFunctionEMA,
)
from lightning_diffusion.gradients import GlobalNorm

GLOBAL_BATCH, STEPS, GIVEN, WARMUP = 64, 120, 20, 20
BOUND = 0.5


class Recorder(L.Callback):
    """Images, norms and times of every step; the averages after the steps whose noise is given.

    Args:
        given: of the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.steps = given, []  # type: tuple[argparse.Namespace, list[dict[str, Any]]]
        self.early: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        give_noise_(module, trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        step: dict[str, Any] = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        step |= {"images": batch["index"].tolist(), "clipped": length_of_gradient(module)}
        step |= {"norm": float(trainer.callback_metrics["train/grad_norm"]), "time": time.perf_counter()}
        self.steps.append(step)
        if trainer.global_step == GIVEN:
            self.early = {name: x.clone() for name, x in whole(module.averages["ema"]).items()}
        trainer.should_stop = trainer.global_step >= self.given.until

    def seen(self) -> dict[str, Any]:
        """As JSON."""
        times = [step.pop("time") for step in self.steps]
        between = [after - before for before, after in zip(times[GIVEN:], times[GIVEN + 1 :], strict=False)]
        return {"steps": self.steps, "step_seconds": median(between or [0.0])}


def give_noise_(module: ld.DiffusionModule, trainer: L.Trainer) -> None:
    """In the first steps the noise, too, is drawn for the global batch, as levels are anyway."""
    objective, draw = module.objective, module.objective.draw

    def drawn(x0: Tensor, key: Any) -> Any:
        level, noise = draw(x0, key)
        if trainer.global_step >= GIVEN:
            return level, noise
        shape = (len(x0) * key.world_size, *x0.shape[1:])
        return level, torch.randn(shape, generator=key.generator("given"))[key.rank :: key.world_size]

    objective.draw = drawn  # type: ignore[method-assign]


def length_of_gradient(module: L.LightningModule) -> float:
    """Of all shards; after clipping, once the step is done."""
    return float(full(get_total_norm([p.grad for p in module.parameters() if p.grad is not None])))


def full(x: Tensor) -> Tensor:
    """A tensor whose shards are gathered."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def job() -> ld.DiffusionModule:
    """As configs/digits.yaml has it, but for a shorter warm-up."""
    network = ld.UNet((1, 8, 8), channels=24, num_blocks=1, attention_levels=[], num_classes=10)
    return ld.DiffusionModule(
        network,
        ld.EDM(stable_target=ld.StableTarget(reference_size=2000)),
        ld.Standardize(),
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        learning_rate=ld.WarmupCosine(WARMUP),
    )


def strategy(name: str) -> str | Strategy:
    """As configs/strategies has it, in float32 over gloo."""
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)
    return ld.FSDP2Strategy() if name == "fsdp2" else "auto"


def peak() -> float:
    """Most resident memory so far, MB: of this program alone, where getrusage may count the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def kept(module: Any, optimizer: torch.optim.Optimizer) -> float:
    """Parameters, gradients, optimizer state and averages of this process, MB."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    state = [x for one in optimizer.state.values() for x in one.values() if isinstance(x, Tensor)]
    tensors = [*parameters, *parameters, *state, *module.averages["ema"].values()]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(x.numel() * x.element_size() for x in local) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="one")
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--until", type=int, default=STEPS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    baseline = peak()
    L.seed_everything(given.seed, verbose=False)
    module, recorder = job(), Recorder(given)
    callbacks = [PowerFunctionEMA(0.1), GradientClipping(GlobalNorm(BOUND)), recorder]
    callbacks += [LastCheckpoint(10_000, given.folder)]
    callbacks += [ActivationCheckpointing()] if given.strategy == "fsdp2" else []
    trainer = L.Trainer(
        accelerator="cpu", devices=given.world, strategy=strategy(given.strategy), max_steps=STEPS, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, limit_val_batches=0,
        num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=given.folder, log_every_n_steps=1,
        plugins=[] if given.strategy == "fsdp2" else [ld.AtomicCheckpointIO()],
    )  # fmt: skip
    last = given.folder / "last.ckpt"
    trainer.fit(
        module, datamodule=Numbered(GLOBAL_BATCH // given.world), ckpt_path=last if last.exists() else None
    )
    found = recorder.seen() | {"peak": peak() - baseline, "kept": kept(module, trainer.optimizers[0])}
    (given.folder / f"rank-{given.until}-{trainer.global_rank}.json").write_text(json.dumps(found))
    if recorder.early and trainer.is_global_zero:
        torch.save(recorder.early, given.folder / "early.pt")


if __name__ == "__main__":
    main()
