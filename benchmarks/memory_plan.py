"""Memory plans beside the measured peak of live tensor storage, in real training steps on the CPU.

python benchmarks/memory_plan.py [--channels 144] [--size 32] [--batch 8] [--only 32-true,bf16-mixed]

Prints the tables of docs/memory.md. The network has 31.5 M parameters with 144 channels; fused AdamW, one EMA. What is
measured is the sum of all storages alive after every operator of `Trainer.fit`, by weak references to the storages
themselves: not the way in which a plan counts.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import lightning_diffusion as ld
from lightning_diffusion.activation_checkpointing import checkpoint_blocks_
from lightning_diffusion.analysis.memory import MemoryPlan, Setting, closed_form, plan_memory
from lightning_diffusion.callbacks import EMA

STEPS = 2  # the second has gradients and optimizer states of the first
SETTINGS = [Setting(precision, checkpointing) for precision in ("32-true", "bf16-mixed", "bf16-true")
            for checkpointing in (False, True)]  # fmt: skip


class MeasuredPeak(TorchDispatchMode):
    """Polls every storage that it has met, after every operator: who is alive, and how large is it now?"""

    def __init__(self, present: Iterator[Tensor]) -> None:
        super().__init__()
        self.met: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        for tensor in present:
            self.meet(tensor)

    def meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self.met[reference.cdata] = (reference, storage.nbytes())

    def poll(self) -> int:
        self.met = {key: pair for key, pair in self.met.items() if not pair[0].expired()}
        return sum(size for _, size in self.met.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.meet(leaf)
        self.peak = max(self.peak, self.poll())
        return out


class Trained(L.Callback):
    """The peak until the last step was taken: what the Trainer puts back afterwards, it puts back on the CPU."""

    def __init__(self, measured: MeasuredPeak) -> None:
        self.measured, self.peak = measured, 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.peak = self.measured.peak


def new_module(channels: int, size: int) -> ld.DiffusionModule:
    network = ld.UNet((3, size, size), channels=channels, multipliers=(1, 2, 2), num_classes=10)
    return ld.DiffusionModule(network, representation=ld.Standardize([0.0] * 3, [0.5] * 3))


def samples(number: int, size: int) -> list[dict[str, Tensor]]:
    return [
        {"image": torch.rand(3, size, size) * 2 - 1, "label": torch.tensor(i % 10)} for i in range(number)
    ]


def measure(module: ld.DiffusionModule, setting: Setting, batch: int) -> int:
    """Bytes at the peak of STEPS steps of Trainer.fit."""
    if setting.checkpointing:
        checkpoint_blocks_(module.network)
    plugins = [] if setting.precision == "32-true" else [setting.plugin]
    quiet: dict[str, Any] = dict(  # noqa: C408
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    measured = MeasuredPeak(iter([*module.parameters(), *module.buffers()]))
    trained = Trained(measured)
    callbacks = [EMA(), trained]
    trainer = L.Trainer(max_steps=STEPS, accelerator="cpu", plugins=plugins, callbacks=callbacks, **quiet)
    loader = DataLoader(samples(STEPS * batch, module.network.image_shape[-1]), batch)
    with measured:
        trainer.fit(module, loader)
    return trained.peak


def plan(channels: int, size: int, setting: Setting, batch: int) -> MemoryPlan:
    example = torch.utils.data.default_collate(samples(batch, size))
    return plan_memory(lambda: new_module(channels, size), example, setting, [EMA()])


def row(planned: MemoryPlan, measured: int) -> str:
    setting = planned.setting
    name = f"`{setting.precision}`{', checkpointed' if setting.checkpointing else ''}"
    parts = [f"{part / 1e6:,.0f}" for part in planned.parts[:5]]
    ratio = f"{planned.total / measured:.3f}"
    return f"| {' | '.join([name, *parts, f'{planned.total / 1e6:,.0f}', f'{measured / 1e6:,.0f}', ratio])} |"


def formula(planned: MemoryPlan, activations: int) -> str:
    """W is all gradients in float32, A the activations in float32."""
    weights = planned.parts.averages
    low, high = closed_form(weights, activations, str(planned.setting.precision), averages=1)
    return f"| `{planned.setting.precision}` | {low / 1e6:,.0f} to {high / 1e6:,.0f} | {planned.total / 1e6:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("channels", 144), ("size", 32), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="32-true,bf16-mixed,bf16-true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    count = sum(p.numel() for p in new_module(given.channels, given.size).parameters())
    print(f"{count / 1e6:.1f} M parameters, {given.size} x {given.size}, batch {given.batch}, MB\n")
    print("| | parameters | gradients | optimizer | average | activations | plan | measured | ratio |")
    print("| --- |" + " ---: |" * 8)
    plans = []
    for setting in (s for s in SETTINGS if s.precision in given.only.split(",")):
        planned = plan(given.channels, given.size, setting, given.batch)
        measured = measure(new_module(given.channels, given.size), setting, given.batch)
        print(row(planned, measured), flush=True)
        plans.append(planned)
    activations = plan(given.channels, given.size, Setting(), given.batch).parts.activations
    print("\n| | closed form | plan |\n| --- | ---: | ---: |")
    print("\n".join(formula(planned, activations) for planned in plans if not planned.setting.checkpointing))


if __name__ == "__main__":
    main()
