r"""What training needs of a device's memory, without a GPU and without allocating anything.

    parameters      parameters and buffers
    gradients       of the step before: Lightning clears them after the forward pass
    optimizer       the optimizers' states
    averages        those of EMA callbacks, at least float32
    activations     what the step needs above all that at its peak: what is kept for backward, batch, temporaries
    communication   DDP: buckets of gradients. FSDP2: blocks while they are gathered and while gradients are reduced

In the closed forms W is 4 bytes per parameter, A the activations in float32, and every average adds W:

    32-true         4 W + A
    bf16-mixed      4.5 W + A / 2 to 4.5 W + A      low-precision copies of weights until backward
    bf16-true       2 W + A / 2

Not in it: what a device's libraries take for themselves (a CUDA context, cuDNN's workspace) and fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from lightning_diffusion.activation_checkpointing import blocks_of
from lightning_diffusion.analysis.fake_step import FakeStep, network_of
from lightning_diffusion.averager import parameters_to_average
from lightning_diffusion.callbacks import EMA
from lightning_diffusion.precision import DiffusionPrecision

Strategy = Literal["one", "ddp", "fsdp"]


class Parts(NamedTuple):
    """Bytes per device, see above."""

    parameters: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    communication: int = 0

    @property
    def weights(self) -> int:
        """All but activations and communication."""
        return self.parameters + self.gradients + self.optimizer + self.averages


@dataclass(frozen=True)
class Setting:
    """How is trained.

    Args:
        precision: 32-true, or one of DiffusionPrecision's, or a precision plugin.
        checkpointing: compute blocks again in the backward pass (`checkpoint_blocks_`).
        strategy: one device; ddp, a copy on each; fsdp, a shard of parameters, gradients, optimizer and averages.
        devices: on how many.

    Raises:
        ValueError: for several devices without a strategy.
    """

    precision: str | Precision = "32-true"
    checkpointing: bool = False
    strategy: Strategy = "one"
    devices: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1 or (self.strategy == "one" and self.devices > 1):
            raise ValueError(
                f"Found {self.devices} devices with strategy={self.strategy!r}; expected at least 1, and for several "
                "'ddp' or 'fsdp'."
            )

    @property
    def plugin(self) -> Precision:
        """The precision plugin."""
        if isinstance(self.precision, Precision):
            return self.precision
        return Precision() if self.precision == "32-true" else DiffusionPrecision(self.precision)  # type: ignore[arg-type]


@dataclass(frozen=True)
class MemoryPlan:
    """What one device needs.

    Args:
        setting: how is trained.
        batch_size: samples per device and micro-batch.
        parts: bytes.
    """

    setting: Setting
    batch_size: int
    parts: Parts

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts)


class MemoryPlanner:
    """Plans of one module under one setting, for any batch size.

    Args:
        module: is not changed; its network may be made under `torch.device("meta")`. Or what makes it.
        batch: a batch as the loader yields it, or the shape (B, C, H, W) of one of images.
        setting: how is trained.
        callbacks: whose averages count.
        accumulate: micro-batches per optimizer step.

    Raises:
        ValueError: for a training step that depends on the values of tensors.
    """

    def __init__(
        self,
        module: LightningModule | Callable[[], LightningModule],
        batch: Any,
        setting: Setting = Setting(),
        callbacks: Sequence[Callback] = (),
        accumulate: int = 1,
    ) -> None:
        made = module if isinstance(module, LightningModule) else module()
        batch = torch.empty(batch, device="meta") if _is_shape(batch) else batch
        self.setting = setting
        self.step = FakeStep(made, batch, setting.plugin, setting.checkpointing, accumulate)
        self._averages = bytes_of_averages(made, callbacks)
        self._planned: dict[int, Parts] = {}

    def plan(self, batch_size: int | None = None) -> MemoryPlan:
        """For so many samples per device and micro-batch; as many as in the batch if not given."""
        size = batch_size or self.step.batch_size
        return MemoryPlan(self.setting, size, spread(self._on_one(size), self.setting, self.step.module))

    def over(self, setting: Setting) -> MemoryPlan:
        """The same step on other devices; precision and checkpointing have to be the planner's own."""
        size = self.step.batch_size
        return MemoryPlan(setting, size, spread(self._on_one(size), setting, self.step.module))

    def largest_batch(self, memory: int) -> int:
        """The most samples per device and micro-batch whose plan is within `memory` bytes; 0 if not even one is.

        The peak is convex in the batch's size, so where a chord between two sizes meets the memory is a size that
        fits, and chords are drawn until the next does not come closer.
        """
        one = self.plan(1).total
        if one > memory:
            return 0
        fits, guess = 1, max(2, self.step.batch_size)
        for _ in range(_CHORDS):
            total = self.plan(guess).total
            fits = max(fits, guess) if total <= memory else fits
            met = 1 + int((memory - one) * (guess - 1) / max(total - one, 1))
            if met == guess or met <= fits:
                break
            guess = met
        return fits

    def estimated_batch(self, memory: int) -> int:
        """`largest_batch` by one chord, from one sample to the batch that was given, and beyond it: for a table."""
        size = max(2, self.step.batch_size)
        one, total = self.plan(1).total, self.plan(size).total
        return 0 if one > memory else 1 + int((memory - one) * (size - 1) / max(total - one, 1))

    def _on_one(self, batch_size: int) -> Parts:
        if batch_size not in self._planned:
            self._planned[batch_size] = self._measured(batch_size)
        return self._planned[batch_size]

    def _measured(self, batch_size: int) -> Parts:
        held, states = _bytes(self.step.held), _bytes(self.step.states)
        gradients = _bytes(self.step.trainable)
        activations = self.step.peak(batch_size) - held - states - gradients
        return Parts(held, gradients, states, self._averages, max(activations, 0))


_CHORDS = 8


def plan_memory(
    module: LightningModule | Callable[[], LightningModule],
    batch: Any,
    setting: Setting = Setting(),
    callbacks: Sequence[Callback] = (),
    accumulate: int = 1,
) -> MemoryPlan:
    """What a training step needs of each device's memory; arguments as of `MemoryPlanner`.

    >>> from lightning_diffusion import DiffusionModule, UNet
    >>> with torch.device("meta"):
    ...     network = UNet((3, 64, 64), channels=32)
    >>> plan = plan_memory(DiffusionModule(network), (16, 3, 64, 64))
    >>> plan.parts.gradients == 4 * sum(p.numel() for p in network.parameters())
    True
    """
    return MemoryPlanner(module, batch, setting, callbacks, accumulate).plan()


def spread(parts: Parts, setting: Setting, module: nn.Module) -> Parts:
    """Parts of one device over several: each holds a whole copy under ddp, a shard under fsdp."""
    if setting.strategy == "one":
        return parts
    if setting.strategy == "ddp":
        return parts._replace(communication=parts.gradients)
    n = setting.devices
    held, gradients, states, averages = (-(-size // n) for size in parts[:4])
    return Parts(held, gradients, states, averages, parts.activations, _gathered(module, setting))


def closed_form(weights: int, activations: int, precision: str, averages: int = 0) -> tuple[int, int]:
    """Bounds on the bytes of AdamW's training, from W and A, both in float32, in bytes.

    Args:
        weights: W, 4 bytes per parameter.
        activations: A.
        precision: 32-true, bf16-mixed, 16-mixed or bf16-true.
        averages: how many.
    """
    share, low, high = _CLOSED_FORMS[precision]
    fixed = int((share + averages) * weights)
    return fixed + int(low * activations), fixed + int(high * activations)


_CLOSED_FORMS = {
    "32-true": (4.0, 1.0, 1.0),
    "bf16-mixed": (4.5, 0.5, 1.0),
    "16-mixed": (4.5, 0.5, 1.0),
    "bf16-true": (2.0, 0.5, 0.5),
}


def bytes_of_averages(module: nn.Module, callbacks: Iterable[Callback]) -> int:
    """Of the averages that callbacks keep on the device: ours in float32 or more, Lightning's a copy of the module."""
    return sum(_averages_of(module, callback) for callback in callbacks)


def _averages_of(module: nn.Module, callback: Callback) -> int:
    if isinstance(callback, EMA):
        chosen = parameters_to_average(module, callback.only).values()
        return len(callback.profiles) * sum(p.numel() * max(p.element_size(), 4) for p in chosen)
    if isinstance(callback, WeightAveraging):
        return _bytes([*module.parameters(), *module.buffers()])
    return 0


def _gathered(module: nn.Module, setting: Setting) -> int:
    """What FSDP2 gathers: what is in no block, and two blocks at once, with the gradients of two."""
    network = network_of(module)
    blocks = [_bytes_computed(block.parameters(), setting) for block in blocks_of(network)]
    rest = _bytes_computed(network.parameters(), setting) - sum(blocks)
    return rest + 4 * max(blocks, default=0)


def _bytes_computed(parameters: Iterable[Tensor], setting: Setting) -> int:
    low = isinstance(setting.plugin, DiffusionPrecision)
    return sum(p.numel() * (2 if low else p.element_size()) for p in parameters)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _is_shape(batch: Any) -> bool:
    return isinstance(batch, (tuple, list, torch.Size)) and all(isinstance(n, int) for n in batch)
