"""Less memory for activations, for one more forward pass."""

from __future__ import annotations

from fnmatch import fnmatch

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_diffusion.activation_checkpointing import blocks_of, checkpoint_blocks_


class ActivationCheckpointing(Callback):
    """Keep of a block only its inputs, and compute the rest again in the backward pass (Chen et al. 2016).

    When:   activations fill the memory: large images, deep networks, few images per device.
    Costs:  one more forward pass of the chosen blocks, a third of their time at most.
    Knobs:  every=2 keeps every other block's activations; only, for the blocks of high resolution alone.
    With:   any strategy and precision; `plan_memory` says beforehand what it saves.

    Args:
        every: one of so many blocks, counted from the first.
        only: patterns of blocks' names in the network, such as ["down.*"]; all if not given.
    """

    def __init__(self, every: int = 1, only: list[str] | None = None) -> None:
        if every < 1:
            raise ValueError(f"found every={every}, expected 1 (all blocks) or more.")
        self.every, self.only = every, only

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            network = getattr(pl_module, "network", pl_module)
            checkpoint_blocks_(network, self._chosen(network))

    def _chosen(self, network: nn.Module) -> list[nn.Module]:
        name = {module: name for name, module in network.named_modules()}
        blocks, patterns = blocks_of(network), self.only or ["*"]
        fitting = [b for b in blocks if any(fnmatch(name[b], pattern) for pattern in patterns)]
        if blocks and not fitting:
            raise ValueError(
                f"only={self.only} fits no block of {type(network).__name__}; its blocks are "
                f"{', '.join(name[b] for b in blocks[:4])}, ... Write a pattern such as 'down.*'."
            )
        return fitting[:: self.every]
