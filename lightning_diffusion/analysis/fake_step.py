"""A training step on tensors without data: every operator runs on shapes and types alone, nothing is allocated.

Autograd keeps for the backward pass what it keeps in a real step, so what is alive at each moment is what would be.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_diffusion.activation_checkpointing import checkpoint_blocks_
from lightning_diffusion.analysis.storages import LiveStorages
from lightning_diffusion.batches import LABEL, declared_conditions, unpack
from lightning_diffusion.module import DiffusionModule
from lightning_diffusion.resume import RandomKey

_NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


class FakeStep:
    """A step of a module with its optimizers, in the order in which Lightning does things.

    Gradients of the step before are still there during the forward pass, and cleared before the backward pass.

    Args:
        module: is not changed; its parameters may be on torch's meta device.
        batch: a batch as a loader yields it; only shapes and types count.
        precision: a precision plugin.
        checkpointing: compute blocks again in the backward pass.
        accumulate: micro-batches per optimizer step.

    Raises:
        ValueError: for a step that depends on the values of tensors.
    """

    def __init__(
        self,
        module: LightningModule,
        batch: Any,
        precision: Precision,
        checkpointing: bool = False,
        accumulate: int = 1,
    ) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.precision, self.accumulate, self.batch = copy.deepcopy(precision), accumulate, batch
        self.module = _fake_copy(module, self.fake).train()
        if checkpointing:
            checkpoint_blocks_(network_of(self.module))
        with self._without_data():
            self.module = _converted(self.module, self.precision)
            self._remember_references()
            self.optimizers = _optimizers(self.module)
            self._take_first_step()

    @property
    def batch_size(self) -> int:
        """Of the batch that was given."""
        return len(next(leaf for leaf in tree_leaves(self.batch) if isinstance(leaf, Tensor)))

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Parameters with gradients."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def held(self) -> list[Tensor]:
        """Parameters and buffers."""
        return [*self.module.parameters(), *self.module.buffers()]

    @property
    def states(self) -> list[Tensor]:
        """What the optimizers keep."""
        kept = (leaf for optimizer in self.optimizers for leaf in tree_leaves(list(optimizer.state.values())))
        return [leaf for leaf in kept if isinstance(leaf, Tensor)]

    def peak(self, batch_size: int | None = None) -> int:
        """The most bytes alive at once during a step with so many samples, averages not among them."""
        with self._without_data(), LiveStorages() as live:
            self._grow_gradients()
            live.watch([*self.held, *self.states, *(p.grad for p in self.trainable if p.grad is not None)])
            live.forget_peak()
            self._step(self._batch_of(batch_size or self.batch_size))
        return int(live.peak)

    def _step(self, batch: Any) -> None:
        with self.precision.forward_context():
            loss = _loss(self.module, self.precision.convert_input(batch))
        if self.accumulate == 1:
            self._clear_gradients()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()

    def _remember_references(self) -> None:
        """As many clean samples as a StableTarget holds during a fit."""
        module = self.module
        target = module.objective.stable_target if isinstance(module, DiffusionModule) else None
        if isinstance(module, DiffusionModule) and target is not None and target.reference_size:
            images, condition = unpack(self._batch_of(target.reference_size))
            target.remember([(module.representation.encode(images.float()), condition.get(LABEL))])

    def _take_first_step(self) -> None:
        self._grow_gradients()
        for optimizer in self.optimizers:
            optimizer.step()

    def _grow_gradients(self) -> None:
        for p in self.trainable:
            p.grad = torch.empty_like(p)

    def _clear_gradients(self) -> None:
        for p in self.trainable:
            p.grad = None

    def _batch_of(self, size: int) -> Any:
        own = self.batch_size

        def fake(x: Tensor) -> Tensor:
            shape = (size, *x.shape[1:]) if x.ndim and len(x) == own else x.shape
            return torch.empty(shape, dtype=x.dtype)

        return tree_map_only(Tensor, fake, self.batch)

    @contextmanager
    def _without_data(self) -> Iterator[None]:
        with warnings.catch_warnings(), self.fake:
            warnings.simplefilter("ignore")
            try:
                yield
            except _NEEDS_DATA as error:
                raise ValueError(
                    f"{type(self.module).__name__} needs the values of tensors in its training step ({error}), and a "
                    "plan has only their shapes. Take .item(), bool() and indexing by masks out of the step."
                ) from error


def _converted(module: Any, precision: Precision) -> Any:
    """As the plugin does it; Lightning's true half precision by hand, whose `Module.to` fails on fake parameters."""
    if not isinstance(precision, HalfPrecision):
        return precision.convert_module(module)
    dtype = precision._desired_input_dtype
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None and p.is_floating_point():
                owner._parameters[name] = nn.Parameter(p.detach().to(dtype), p.requires_grad)
        for name, b in owner._buffers.items():
            if b is not None and b.is_floating_point():
                owner._buffers[name] = b.to(dtype)
    return module


def _fake_copy(module: LightningModule, mode: FakeTensorMode) -> LightningModule:
    """The module with every parameter and buffer in its type and shape on the CPU, without data."""
    twins: dict[int, Any] = {}
    with mode:
        for p in module.parameters():
            twins[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for buffer in module.buffers():
            twins[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    trainer, module._trainer = module._trainer, None
    try:
        return copy.deepcopy(module, twins)
    finally:
        module._trainer = trainer


def network_of(module: nn.Module) -> nn.Module:
    """What of a module is trained: its `network`, or itself."""
    network = getattr(module, "network", module)
    return network if isinstance(network, nn.Module) else module


def _loss(module: LightningModule, batch: Any) -> Tensor:
    if not isinstance(module, DiffusionModule):
        output: Any = module.training_step(batch, 0)
        loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
        return loss
    images, condition = unpack(batch)
    taken = declared_conditions(module.network)
    if module.label_dropout >= 1 or getattr(module.network, "num_classes", None) == 0:
        taken = taken - {LABEL}
    condition = {name: value for name, value in condition.items() if name in taken}
    key = RandomKey()
    x0 = module.representation.draw(images.float(), key)
    return module.objective.loss(module.network, x0, condition, key).loss


def _optimizers(module: LightningModule) -> Sequence[Optimizer]:
    if isinstance(module, DiffusionModule):
        return [module.optimizer([p for p in module.parameters() if p.requires_grad])]
    return list(_found(module.configure_optimizers()))


def _found(configured: Any) -> Iterator[Optimizer]:
    """The optimizers in what `configure_optimizers` returns."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from _found(configured.get("optimizer"))
    elif isinstance(configured, (list, tuple)):
        for part in configured:
            yield from _found(part)
